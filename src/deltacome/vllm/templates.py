"""Whether vLLM can look through an artifact's chat template.

It does so in the event loop of the API server, for each template that it meets, to find out how a
message's content is written. vLLM 0.32 follows assignments from `messages` on without noting where it has
been: three that go in a circle would keep it for ever, and with it all requests.

A template is a program all the same. What it does when a chat is written is not looked at here: the
setting `templates` is for artifacts of people who are not trusted.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter

import jinja2
from jinja2 import nodes

from deltacome.errors import ArtifactError
from deltacome.vllm import compat

MAX_NBYTES = 64 << 10
"""Of a template; those of large models that call tools have 20,000."""
MAX_ASSIGNED = 64
"""Assignments that lead on from `messages`."""
MAX_STEPS = 4_000_000
"""Of vLLM's search, at worst: about two seconds. The largest templates take a tenth of it."""


def check_template(where: str, template: str) -> None:
    """Refuses a template that vLLM would search for long.

    Args:
        where: it comes from, for errors.
        template: Jinja; one that is not valid passes, and vLLM tells who asks for a chat.

    Raises:
        ArtifactError: it is too large, or too much in it depends on the messages.
    """
    if len(template.encode(errors="replace")) > MAX_NBYTES:
        raise ArtifactError(f"{where}: expected at most {MAX_NBYTES} bytes, got more")
    environment = jinja2.Environment(
        extensions=[compat.AssistantTracker, "jinja2.ext.loopcontrols"]
    )
    try:
        steps = _steps(environment.parse(template))
    except jinja2.TemplateSyntaxError:
        return
    except RecursionError as error:
        raise ArtifactError(f"{where}: expected less that is nested, got too much") from error
    if steps > MAX_STEPS:
        raise ArtifactError(
            f"{where}: expected one that vLLM can search in {MAX_STEPS} steps, got {steps}: it assigns "
            "from messages in a circle, or has too many loops and macros"
        )


def _steps(root: nodes.Template) -> float:
    """At most so many nodes are looked at in the search."""
    assigned = 0
    with contextlib.suppress(AssertionError):  # on an attribute's assignment vLLM gives up too
        found = compat.assigned_from(root, "messages")
        assigned = sum(1 for _ in itertools.islice(found, MAX_ASSIGNED + 1))
    if assigned > MAX_ASSIGNED:
        return float("inf")
    counts = Counter(type(node) for node in root.find_all(nodes.Node))
    loops, macros = counts[nodes.For], counts[nodes.Macro]
    return counts.total() * (assigned + (macros + 1) * (loops + 1))
