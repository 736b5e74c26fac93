"""Whether vLLM can search an artifact's chat template in reasonable time.

It searches each template that it meets, in the event loop of the API server, to find out how a message's
content is written. vLLM 0.32 follows assignments from `messages` on without noting where it has been:
three that form a circle would keep it busy for ever, and hold up all requests.

A template is a program all the same. What it does when a chat is written is not checked here: the setting
`templates` is for artifacts of people who are not trusted.
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
"""Largest size of a template; those of large models that call tools have 20,000 bytes."""
MAX_ASSIGNED = 64
"""Most assignments that may lead on from `messages`."""
MAX_STEPS = 4_000_000
"""Most steps of vLLM's search: about two seconds at worst. The largest templates take a tenth of it."""


def check_template(where: str, template: str) -> None:
    """Refuses a template that vLLM would take long to search.

    Args:
        where: where it comes from, for errors.
        template: Jinja; one that is not valid passes, and vLLM tells whoever asks for a chat.

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
        raise ArtifactError(f"{where}: expected less nesting, got too much") from error
    if steps > MAX_STEPS:
        raise ArtifactError(
            f"{where}: expected one that vLLM can search in {MAX_STEPS} steps, got {steps}: it assigns "
            "from messages in a circle, or has too many loops and macros"
        )


def _steps(root: nodes.Template) -> float:
    """An upper bound on the nodes that are looked at in the search."""
    assigned = 0
    with contextlib.suppress(AssertionError):  # where an attribute is assigned, vLLM gives up too
        found = compat.assigned_from(root, "messages")
        assigned = sum(1 for _ in itertools.islice(found, MAX_ASSIGNED + 1))
    if assigned > MAX_ASSIGNED:
        return float("inf")
    counts = Counter(type(node) for node in root.find_all(nodes.Node))
    loops, macros = counts[nodes.For], counts[nodes.Macro]
    return counts.total() * (assigned + (macros + 1) * (loops + 1))
