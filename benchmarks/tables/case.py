"""Figure 4, the case study: a question that the tuned model and ours get right, and baselines wrong.

Found by going through the held-out questions of every task and taking the one on which the most
baselines fail. So that ours are right is the condition, not a result.
"""

import cells as md
from lab import Lab
from rows import main_rows

from deltacome import Adaptive
from deltacome.evals.score import exact_match


def make(lab: Lab) -> str:
    rows = main_rows(lab.size)
    ours = [name for name, method, _ in rows if isinstance(method, Adaptive)]
    baselines = [name for name, _, _ in rows if name not in ours]
    best = (0, "", -1)
    said: dict[str, dict[str, list[str]]] = {}
    for task in lab.size.tasks:
        said[task] = {
            "backbone": lab.measure(task, lab.dense(lab.base))["answers"],
            "tuned": lab.measure(task, lab.dense(lab.tenant(task)))["answers"],
        }
        for name, method, ratio in rows:
            said[task][name] = lab.cell(task, method, ratio)["answers"]
        for i, question in enumerate(lab.questions(task)):
            right = {
                n: exact_match(answers[i], question.answer) for n, answers in said[task].items()
            }
            wrong = sum(not right[name] for name in baselines)
            if right["tuned"] and all(right[name] for name in ours) and wrong > best[0]:
                best = (wrong, task, i)
    title = "## Case study: one question, all answers\n\n"
    wrong, task, i = best
    if not wrong:
        return f"{title}No question was found that tuned and ours get right and a baseline wrong."
    question = lab.questions(task)[i]
    lines = [
        [
            name,
            f"`{_line(answers[i])}`",
            "yes" if exact_match(answers[i], question.answer) else "no",
        ]
        for name, answers in said[task].items()
    ]
    return (
        f"{title}The question that most others get wrong, of those that tuned and `adaptive` get right. "
        f"Of `{task}`: `{question.prompt}` The right answer is `{question.answer}`.\n\n"
        + md.table(["model", "answer", "right"], lines)
    )


def _line(answer: str) -> str:
    """An answer for a table cell: on one line, without characters that end code or a cell."""
    return answer.strip().replace("\n", "⏎").replace("`", "'").replace("|", "¦")
