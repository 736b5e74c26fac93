"""Table 5: a second backbone of another family, Gemma 3 270M, with the rows of table 3."""

from lab import Lab
from t3 import methods_table

BASE, TASK = "gemma", "tiny"


def make(lab: Lab) -> str:
    base = lab.base.with_name(BASE)
    if not base.exists():
        raise SystemExit(
            f"{base}: expected the second backbone, found none; make it with "
            f"`python examples/tenants/base.py --model gemma3-270m -o {base}`"
        )
    given = {TASK: lab.given[f"{BASE}-{TASK}"]} if f"{BASE}-{TASK}" in lab.given else {}
    table = methods_table(lab.second(base, TASK, given))
    return f"## T5 on {TASK}: a second backbone, Gemma 3 270M\n\n" + table
