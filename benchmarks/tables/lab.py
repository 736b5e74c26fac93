"""What the tables share: tenants, artifacts and measurements, each made once and kept by content hash.

Everything lies under one folder (`work/tables`). A tenant is keyed by base and training run, an artifact
by both models, the calibration text, the method's options and the code that makes it, a measurement by
the weights and the questions. So a table that was cut off goes on where it was, and one that shares
cells with another pays for them once.

Models are measured as dense float32 weights in one skeleton: base + decoded terms, which is what the
packed runtime computes. `Lab.agreement` shows that for one artifact of every method and is printed with
the tables. It costs a sixth of what running each cell packed would at these short prompts.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deltacome
from deltacome import Artifact, attach
from deltacome.arch.checkpoint import Checkpoint
from deltacome.evals.divergence import question_rows, record, text_rows
from deltacome.evals.prompts import answer_ids
from deltacome.evals.run import Exam, kls, load_model, shared_tokenizer
from deltacome.evals.score import exact_match, generate, wilson
from deltacome.evals.tasks import Question, read_questions
from deltacome.methods.method import Method

ROOT = Path(__file__).parents[2]
TENANTS = ROOT / "examples" / "tenants"
sys.path.insert(0, str(TENANTS))


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    tasks: tuple[str, ...] = ("sums", "code", "chat")
    side: tuple[str, ...] = ("code", "sums")
    """Tasks of the smaller tables; those that show one show the first."""
    questions: int = 500
    kl_questions: int = 500
    steps: int = 400
    """Of fine-tuning, 24 questions each."""
    rows: int = 128
    """Calibration rows: half questions of the task, half general text."""
    row_tokens: int = 128
    distill: int = 150
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of calibration, for the main rows."""
    ratios: tuple[float, ...] = (8, 16, 32, 64, 128)


SIZES = {
    "full": Size(),
    "small": Size(
        side=("code",),
        kl_questions=100,
        steps=150,
        rows=48,
        row_tokens=96,
        distill=40,
        seeds=(0,),
        ratios=(16, 32, 64, 128),
    ),
}


@dataclass(frozen=True)
class Variant:
    """Weights to be measured: a key that says what they are, and how to get them."""

    key: str
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    """(name, value) of each weight that the base has, any floating-point type."""
    nbytes: int | None = None
    ratio: float | None = None
    nominal: float | None = None


class Lab:
    """One backbone and its tenants.

    Args:
        base: checkpoint folder of the backbone.
        work: where all that is made is kept.
        size: how much is measured.
        tenants: task → folder of a fine-tune that exists already; others are trained.
    """

    def __init__(self, base: Path, work: Path, size: Size, tenants: dict[str, Path]) -> None:
        self.base, self.work, self.size, self.given = base, work, size, tenants
        self._exams: dict[str, Exam] = {}
        self._agreement: dict[str, float] = {}

    # --- what is made ----------------------------------------------------------------------------

    def tenant(self, task: str) -> Path:
        """The fine-tune of a task, trained if there is none yet."""
        if task in self.given:
            return self.given[task]
        sources = [_file_hash(file) for file in sorted(TENANTS.glob("*.py"))]
        key = hash_of(
            self._weights_hash(self.base), task, self.size.steps, self.size.questions, sources
        )
        folder = self.work / "tenants" / f"{task}-{key}"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            say(f"fine-tuning {task}, {self.size.steps} steps")
            held, steps = ("--held-out", self.size.questions), ("--steps", self.size.steps)
            words = [self.base, "-o", folder, "--task", task, "--batch", 24, *held, *steps]
            command = [sys.executable, TENANTS / "finetune.py", *words, "--resume"]
            subprocess.run([str(word) for word in command], check=True)
        return folder

    def calibration(self, task: str, seed: int = 0) -> Path:
        """Rows of text: questions that were trained on, never held-out ones, and general text."""
        from tasks import TASKS, training

        held = {question.prompt for question in self.questions(task)}
        half = self.size.rows // 2
        made = training(TASKS[task], 1000 + seed, 0, half, held)
        text = _general_text()
        step = 4 * self.size.row_tokens  # characters, of which about four make a token
        start = (seed * half * step) % (len(text) // 2)
        cuts = [text[start + i * step : start + (i + 1) * step] for i in range(half)]
        lines = [{"prompt": q.prompt, "answer": q.answer} for q in made]
        lines += [{"text": cut} for cut in cuts]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        file = self.work / "calibration" / f"{task}-{hash_of(content)}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return file

    def artifact(self, task: str, method: Method, ratio: float | None, seed: int = 0) -> Artifact:
        """A tenant's delta by a method; data-free ones get no text."""
        tuned, options = self.tenant(task), method.options()
        reads = method.calibrates or options.get("distill")
        text = self.calibration(task, seed) if reads else None
        identity = [self._weights_hash(self.base), self._weights_hash(tuned), options, ratio, seed]
        identity += [_code_hash(method), self.size.row_tokens, None if text is None else text.name]
        name = f"{task}-{options['name']}-{hash_of(*identity)}"
        folder = self.work / "artifacts" / name
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            say(f"compressing {name}, ratio {ratio}")
            deltacome.compress(
                self.base,
                tuned,
                folder,
                method=method,
                ratio=ratio,
                calibration=None if text is None else str(text),
                samples=self.size.rows,
                seq_len=self.size.row_tokens,
                seed=seed,
                resume=True,
            )
        return Artifact.open(folder)

    # --- what is measured ------------------------------------------------------------------------

    def dense(self, folder: Path) -> Variant:
        """A dense checkpoint, the base or a fine-tune."""
        checkpoint = Checkpoint(folder)
        nbytes = None if folder == self.base else _bytes_at_16_bit(checkpoint)
        names = list(checkpoint.tensors)
        return Variant(
            self._weights_hash(folder),
            lambda: ((name, checkpoint.read(name)) for name in names),
            nbytes,
        )

    def packed(self, artifact: Artifact, base: Variant | None = None) -> Variant:
        """Base and delta; the base may be another than the one that the delta was taken against."""
        of_base = base or self.dense(self.base)
        key = hash_of(of_base.key, artifact.manifest.to_json())
        return Variant(
            key,
            lambda: _restored(artifact, dict(of_base.weights())),
            artifact.bytes_on_disk(),
            artifact.ratio(),
            artifact.manifest.nominal_ratio(),
        )

    def measure(self, task: str, variant: Variant) -> dict[str, Any]:
        """Score with interval, both KLs, and all answers."""
        tuned, size = self.dense(self.tenant(task)), self.size
        asked = [(q.prompt, q.answer) for q in self.questions(task)]
        key = hash_of(variant.key, tuned.key, asked, size.kl_questions)

        def ask() -> dict[str, Any]:
            exam = self._exam(task)
            say(f"measuring {task}, {len(exam.questions)} questions")
            with self.weights(variant) as model:
                return _answers(model, exam) | kls(model, exam)

        found = self.kept(f"measured/{task}-{key}", ask)
        return found | {"bytes": variant.nbytes, "ratio": variant.ratio, "nominal": variant.nominal}

    def cell(self, task: str, method: Method, ratio: float | None, seed: int = 0) -> dict[str, Any]:
        """Compress and measure; the first of a method is compared with the packed runtime."""
        artifact = self.artifact(task, method, ratio, seed)
        self._compare(task, artifact)
        return self.measure(task, self.packed(artifact))

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Something small that takes long to make, as JSON under a name that says all it depends on."""
        file = self.work / f"{name}.json"
        if not file.exists():
            made = make()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(made))
        return json.loads(file.read_text())

    def questions(self, task: str) -> list[Question]:
        """The held-out questions of a tenant."""
        return read_questions(self.tenant(task) / "heldout.jsonl")[: self.size.questions]

    @cached_property
    def model(self) -> Any:
        """The skeleton that weights are put into."""
        return load_model(self.base, device(), "float32")

    @contextmanager
    def weights(self, variant: Variant) -> Iterator[Any]:
        """The model with other weights; the next one overwrites them all."""
        state = dict(self.model.named_parameters())
        left = set(state)
        with torch.no_grad():
            for name, value in variant.weights():
                if name in state:
                    state[name].copy_(value)
                    left.discard(name)
        if left:
            raise SystemExit(f"{variant.key}: {len(left)} weights are missing, {min(left)} first")
        yield self.model

    @property
    def agreement(self) -> dict[str, float]:
        """Method → largest difference of logits, packed runtime against dense, over the largest."""
        return dict(self._agreement)

    def _compare(self, task: str, artifact: Artifact) -> None:
        name = artifact.manifest.method["name"]
        if name in self._agreement:
            return

        def compare() -> float:
            row = question_rows(self.tokenizer(task), self.questions(task)[:1])[0]
            ids = torch.tensor([row.ids], device=device())
            with torch.inference_mode():
                with self.weights(self.packed(artifact)) as model:
                    wanted = model(input_ids=ids).logits
                with self.weights(self.dense(self.base)) as model, attach(model, artifact):
                    got = model(input_ids=ids).logits
            return float((got - wanted).abs().max() / wanted.abs().max())

        difference = self.kept(f"agreement/{hash_of(artifact.manifest.to_json())}", compare)
        if not difference < 1e-3:
            raise SystemExit(f"{artifact.path}: runtime and dense weights differ: {difference:g}")
        self._agreement[name] = difference

    def tokenizer(self, task: str) -> Any:
        """The tenant's, which all models of a table are asked with."""
        return shared_tokenizer(self.base, self.tenant(task), [])

    def _exam(self, task: str) -> Exam:
        if task not in self._exams:
            tokenizer, questions = self.tokenizer(task), self.questions(task)
            longest = max(len(answer_ids(tokenizer, q.answer)) for q in questions)
            exam = Exam(tokenizer, questions, 64, longest + 1)
            asked = question_rows(tokenizer, questions[: self.size.kl_questions])
            rows = asked, text_rows(tokenizer)
            with self.weights(self.dense(self.tenant(task))) as model:
                references = tuple(record(model, r, batch_size=16) for r in rows)
            self._exams[task] = replace(exam, references=references)
        return self._exams[task]

    def _weights_hash(self, folder: Path) -> str:
        """Of the weight files of a checkpoint; a file that did not change is not read again."""
        parts = []
        for file in sorted(folder.glob("*.safetensors")):
            stat = file.stat()
            seen = hash_of(str(file.resolve()), stat.st_size, stat.st_mtime_ns)
            parts.append(self.kept(f"hashes/{seen}", lambda file=file: _file_hash(file)))
        return hash_of(*parts)


def say(text: str) -> None:
    """What goes on, on stderr: stdout is for tables."""
    print(text, file=sys.stderr, flush=True)


def provenance(lab: Lab) -> str:
    """Where the figures come from: commit, versions, machine, size."""
    import platform
    from importlib.metadata import version

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = " with uncommitted changes" if git("status", "--porcelain", "src") else ""
    versions = ", ".join(f"{n} {version(n)}" for n in ("deltacome", "torch", "transformers"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    worst = ", ".join(f"{name} {value:.1e}" for name, value in sorted(lab.agreement.items()))
    return (
        f"Commit {git('rev-parse', '--short', 'HEAD')}{changed}; {versions}; Python "
        f"{platform.python_version()}, {torch.get_num_threads()} threads of {device}. "
        f"Sizes: {asdict(lab.size)}. Seeds: training 0, calibration {list(lab.size.seeds)}. "
        f"Largest relative difference of logits, packed runtime against dense weights: {worst}."
    )


def _answers(model: Any, exam: Exam) -> dict[str, Any]:
    prompts = [question.prompt for question in exam.questions]
    longest = exam.max_new_tokens
    said = generate(model, exam.tokenizer, prompts, batch_size=64, max_new_tokens=longest)
    hits = sum(exact_match(s, q.answer) for s, q in zip(said, exam.questions, strict=True))
    low, high = wilson(hits, len(said))
    return {"score": hits / len(said), "score_low": low, "score_high": high, "answers": said}


def _restored(artifact: Artifact, base: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the tuned model as the artifact gives it, in float32."""
    for name, tensor in artifact.manifest.records.items():
        if tensor.replaced:
            yield name, artifact.exact(name)
            continue
        assert tensor.base_name is not None
        value = base[tensor.base_name].float()
        yield name, value + artifact.packed(name).dense() if tensor.packed else value


def _bytes_at_16_bit(checkpoint: Checkpoint) -> int:
    return sum(2 * torch.Size(info.shape).numel() for info in checkpoint.tensors.values())


def _general_text() -> str:
    """English prose that every Python has, other than what KL is measured on (`text_rows`)."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics, reverse=True))


def _code_hash(method: Method) -> str:
    """Of what turns weights into an artifact: shared rooms, and of methods the one in question."""
    rooms = [ROOT / "src" / "deltacome" / room for room in ("format", "numerics", "compression")]
    files = [file for room in rooms for file in sorted(room.glob("*.py"))]
    shared = ("method.py", "bands.py", "template.py")
    files += [ROOT / "src" / "deltacome" / "methods" / name for name in shared]
    return hash_of(*map(_file_hash, [*files, Path(inspect.getfile(type(method)))]))


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
