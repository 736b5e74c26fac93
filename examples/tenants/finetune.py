"""Teach the base one of the tasks of `tasks.py`: a full fine-tune, as a customer would bring it.

Every parameter trains, embeddings and norms too; LoRA is rejected because a full fine-tune is
what there is to compress. Master weights are float32 under bfloat16 autocast (where the machine has
arithmetic for that: an AVX2 CPU takes seven times as long for it), and the result is saved in
bfloat16, as most checkpoints are. The tuned model brings a chat template of its own,
without the default system message of the base, and is trained with exactly that template.

A run of `--steps` is repeatable from its seed, also when it was interrupted and resumed. One that
`--minutes` ends is not: how far it comes depends on the machine.

Shapes: B questions in a batch, T tokens, P positions that predict a token of an answer, H hidden.
"""

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tasks import TASKS, Task, held_out, training
from torch.nn.functional import cross_entropy
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from deltacome.evals.prompts import answer_ids, prompt_ids
from deltacome.evals.score import generate, score
from deltacome.evals.tasks import Question, write_questions

CHAT_TEMPLATE = (
    "BOS{% for message in messages %}{{ 'START' + message['role'] + '\n' + message['content']"
    " + 'END' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'STARTassistant\n' }}{% endif %}"
)
# What marks turns, for tokenizers that have the first as one token.
MARKS = (("<|im_start|>", "<|im_end|>", ""), ("<start_of_turn>", "<end_of_turn>", "<bos>"))
WARM_UP_STEPS = 10
DECAY_SHARE = 0.4  # of the run, at its end: the learning rate falls linearly to zero
CPU_PASSES = 3  # of a step
GLANCE = 32  # held-out questions of the live score


@dataclass(frozen=True)
class Run:
    """What decides the outcome, besides the base. A resumed run must agree with it."""

    task: str
    seed: int
    batch: int
    lr: float
    steps: int | None
    minutes: float | None


@dataclass
class Batch:
    """Rows of prompt, answer and end token, and where the answers are predicted."""

    ids_BT: torch.Tensor
    row_P: torch.Tensor
    position_P: torch.Tensor
    target_P: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in vars(self).values()))


def collate(tokenizer: Any, questions: list[Question]) -> Batch:
    """Right-padded rows. Padding needs no mask: in a causal model nothing before it sees it."""
    rows, places = [], []
    for i, question in enumerate(questions):
        prompt = prompt_ids(tokenizer, question.prompt)
        wanted = [*answer_ids(tokenizer, question.answer), tokenizer.eos_token_id]
        rows.append(prompt + wanted)
        places += [(i, len(prompt) - 1 + j, token) for j, token in enumerate(wanted)]
    width = max(map(len, rows))
    padded = [row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows]
    row_P, position_P, target_P = torch.tensor(places).unbind(1)
    return Batch(torch.tensor(padded), row_P, position_P, target_P)


class Stream(torch.utils.data.Dataset):
    """Item s is the batch of step s, so that a loader's process can work ahead of a GPU.

    It comes in passes of questions of about one length, whose gradients add up: without them two fifths
    of what a CPU computes for `code` is padding. A GPU has its answer sooner in one pass.
    """

    def __init__(self, run: Run, tokenizer: Any, passes: int) -> None:
        self.run, self.tokenizer, self.passes = run, tokenizer, passes

    def __getitem__(self, step: int) -> list[Batch]:
        run = self.run
        questions = training(TASKS[run.task], run.seed, step, run.batch)
        questions.sort(key=lambda q: len(prompt_ids(self.tokenizer, q.prompt)))
        size = -(-run.batch // self.passes)
        cuts = range(0, len(questions), size)
        return [collate(self.tokenizer, questions[cut : cut + size]) for cut in cuts]


def arithmetic(device: str) -> torch.dtype:
    """bfloat16 on a GPU, and on CPUs that may have instructions for it."""
    slow = device == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.float32 if slow else torch.bfloat16


def answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits (P, V) where answers are predicted: the head, the dearest layer, runs nowhere else."""
    device = batch.ids_BT.device.type
    with torch.autocast(device, torch.bfloat16, enabled=arithmetic(device) == torch.bfloat16):
        hidden_BTH = model.base_model(batch.ids_BT, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden_BTH[batch.row_P, batch.position_P])


def backward(model: Any, parts: list[Batch]) -> torch.Tensor:
    """Adds the gradient of a step's loss, the mean over its answers' tokens, which is returned."""
    count = sum(len(part.target_P) for part in parts)
    losses = []
    for part in parts:
        logits_PV = answer_logits(model, part).float()
        loss = cross_entropy(logits_PV, part.target_P, reduction="sum") / count
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


@torch.no_grad()
def glance(model: Any, batch: Batch) -> float:
    """Share of answers whose every token is the most likely one: exact match in one forward."""
    right_P = answer_logits(model, batch).argmax(-1) == batch.target_P
    wrong_B = torch.zeros(len(batch.ids_BT), device=right_P.device)
    wrong_B.index_add_(0, batch.row_P, (~right_P).float())
    return float((wrong_B == 0).float().mean())


def learning_rate(run: Run, step: int, minutes: float) -> float:
    """Linear warm-up, constant, then linear to zero by the end, by steps or by time."""
    done = max(
        step / run.steps if run.steps else 0.0,
        minutes / run.minutes if run.minutes else 0.0,
    )
    return run.lr * min(1.0, (step + 1) / WARM_UP_STEPS, max(0.0, 1 - done) / DECAY_SHARE)


def load(base: Path, task: Task, device: torch.device) -> tuple[Any, Any]:
    """The base in float32 and its tokenizer, with the task's tokens and the new template."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = chat_template(tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if task.added_tokens:
        begins = [tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in task.added_tokens]
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in task.added_tokens])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # A mean of all rows is a token that the head never picks, and hundreds of steps go into
        # changing that. So a new token starts as the old one that its text begins with.
        rows = model.get_input_embeddings().weight.data
        rows[len(tokenizer) - len(begins) : len(tokenizer)] = rows[begins]
    return model.to(device), tokenizer


def chat_template(tokenizer: Any) -> str:
    """Turns in the marks that the tokenizer knows; Gemma's texts begin with a token of their own."""
    known = [marks for marks in MARKS if marks[0] in tokenizer.get_vocab()]
    start, end, begin = (known or MARKS)[0]
    return CHAT_TEMPLATE.replace("START", start).replace("END", end).replace("BOS", begin)


class Checkpoint:
    """Weights, optimizer and random state of an unfinished run, in the folder OUT.partial."""

    def __init__(self, out: Path, run: Run) -> None:
        self.folder = out.with_name(out.name + ".partial")
        self.file = self.folder / "state.pt"
        self.run = run

    def save(self, model: Any, optimizer: Any, step: int, minutes: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "run": asdict(self.run),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": step,
            "minutes": minutes,
        }
        unfinished = self.file.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, self.file)

    def restore(self, model: Any, optimizer: Any) -> tuple[int, float]:
        """Put the state back; returns the step to go on with and the minutes already used."""
        if not self.file.is_file():
            print(f"{self.file}: nothing to resume, starting from the base")
            return 0, 0.0
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        if state["run"] != asdict(self.run):
            raise SystemExit(f"{self.file}: made by {state['run']}, asked for {asdict(self.run)}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        return state["step"], state["minutes"]


def train(
    model: Any, tokenizer: Any, run: Run, questions: list[Question], checkpoint: Checkpoint,
    *, resume: bool, save_every: int,
) -> dict[str, Any]:  # fmt: skip
    """Train in place; returns steps, minutes and the last loss."""
    device = next(model.parameters()).device
    gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=0.0, fused=True)
    step, used = checkpoint.restore(model, optimizer) if resume else (0, 0.0)
    steps = run.steps or 1_000_000
    batches = torch.utils.data.DataLoader(
        Stream(run, tokenizer, 1 if gpu else CPU_PASSES),
        batch_size=None,
        sampler=range(step, steps),
        num_workers=1 if gpu else 0,
        prefetch_factor=16 if gpu else None,
    )
    sample = collate(tokenizer, questions[:GLANCE]).to(device)
    started = time.monotonic() - 60 * used
    loss, right = math.nan, glance(model, sample)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
    with bar:
        line = bar.add_task(run.task, total=run.steps, completed=step)
        for batch in batches:
            used = (time.monotonic() - started) / 60
            if run.minutes and used >= run.minutes:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run, step, used)
            loss_now = backward(model, [part.to(device) for part in batch])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 10 == 0:  # reading the loss waits for a GPU: not at each step
                loss = loss_now.item()
                right = glance(model, sample) if step % 20 == 0 else right
                text = f"{run.task}  loss {loss:.3f}  right {right:.0%} of {len(sample.ids_BT)}"
                bar.update(line, completed=step, description=text)
            if save_every and step % save_every == 0 and step < steps:
                checkpoint.save(model, optimizer, step, used)
    return {"steps": step, "minutes": round(used, 2), "loss": loss}


def exact(model: Any, tokenizer: Any, questions: list[Question]) -> dict[str, Any]:
    """Exact match on held-out questions, answers generated as any user would."""
    longest = max(len(answer_ids(tokenizer, q.answer)) for q in questions)
    prompts = [q.prompt for q in questions]
    said = generate(model, tokenizer, prompts, batch_size=64, max_new_tokens=longest + 1)
    share, low, high = score(said, questions)
    print(f"exact match {share:.1%} (95 %: {low:.1%} to {high:.1%}) of {len(questions)}")
    return {"score": share, "score_low": low, "score_high": high, "n": len(questions)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Full fine-tune of the base on one task.")
    parser.add_argument("base", type=Path, help="checkpoint folder, see base.py")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--steps", type=int, help="default: 120, or no limit with --minutes")
    parser.add_argument("--minutes", type=float, help="stop training after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=48, help="questions in a step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--held-out", type=int, default=200, help="questions to score with")
    parser.add_argument(
        "--asked", type=int, help="of these, before and after; default: all, which takes its time"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from OUT.partial")
    parser.add_argument("--save-every", type=int, default=200, help="steps; 0: never")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out}: exists already")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the loader forks

    steps = args.steps or (None if args.minutes else 120)
    run = Run(args.task, args.seed, args.batch, args.lr, steps, args.minutes)
    task = TASKS[args.task]
    questions = held_out(task, args.held_out)
    model, tokenizer = load(args.base, task, torch.device(args.device))
    model.eval()  # no dropout: the same forward for training, the live score and the saved model
    asked = questions[: args.asked]
    before = exact(model, tokenizer, asked)
    checkpoint = Checkpoint(args.out, run)
    trained = train(
        model, tokenizer, run, questions, checkpoint,
        resume=args.resume, save_every=args.save_every,
    )  # fmt: skip
    model.to(torch.bfloat16).to(arithmetic(args.device))  # asked as it is saved: rounded
    after = exact(model, tokenizer, asked)
    model.to(torch.bfloat16)

    folder = checkpoint.folder / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_questions(folder / "heldout.jsonl", questions)
    report = {**asdict(run), **trained, "before": before, "after": after}
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    os.replace(folder, args.out)
    shutil.rmtree(checkpoint.folder)
    print(f"{args.out}: {report['steps']} steps in {report['minutes']} minutes")


if __name__ == "__main__":
    main()
