import math
from types import SimpleNamespace

import pytest
import torch
from evals_helpers import make_model, make_tokenizer

from deltacome.errors import DeltaError, OutputError
from deltacome.evals.divergence import (
    Compared,
    by_row,
    divergence,
    over_rows,
    question_rows,
    record,
    text_rows,
    vocabulary,
)
from deltacome.evals.tasks import Question
from deltacome.rows import Row

ROWS = [
    Compared(Row(ids), first)
    for ids, first in [([3, 4, 5, 6, 7], 0), ([9, 10], 1), (range(5, 12), 3)]
]


class Constant(torch.nn.Module):
    """Gives the same distribution everywhere."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log() + 3.0  # any offset is the same model
        self.embedding = torch.nn.Embedding(len(probabilities), 1)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_a_model_does_not_differ_from_itself(model):
    # Rows that share a pass round differently on some machines.
    assert divergence(model, record(model, ROWS, batch_size=2)).nats == pytest.approx(0.0, abs=1e-7)


def test_batches_do_not_change_the_mean(model):
    other = make_model(vocabulary(model), seed=1)
    small = divergence(other, record(model, ROWS, batch_size=1)).nats
    assert small > 0.01
    assert divergence(other, record(model, ROWS, batch_size=3)).nats == pytest.approx(
        small, rel=1e-4
    )


def test_the_head_is_asked_about_what_is_compared_alone(model):
    asked = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, out: asked.append(out.shape[1]))
    record(model, ROWS[1:], batch_size=2)
    hook.remove()
    assert asked == [6]  # of seven positions: the first is never compared


def test_mean_is_over_the_compared_positions_only(model):
    other = make_model(vocabulary(model), seed=1)
    kls = []
    for one in ROWS:
        ids = torch.tensor([one.row.ids])
        with torch.no_grad():
            p = model(ids).logits[0].double().log_softmax(-1)
            q = other(ids).logits[0].double().log_softmax(-1)
        kls += (p.exp() * (p - q)).sum(-1)[one.first :].tolist()
    assert len(kls) == 5 + 1 + 4
    expected = sum(kls) / len(kls)
    assert divergence(other, record(model, ROWS)).nats == pytest.approx(expected, rel=1e-4)


def test_known_value_and_direction():
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    rows = [Compared(Row([0, 1, 2]))]
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert divergence(Constant(q), record(Constant(p), rows)).nats == pytest.approx(
        expected, rel=1e-5
    )
    skewed = record(Constant([0.9, 0.05, 0.05]), rows)
    assert divergence(Constant([1 / 3] * 3), skewed).nats == pytest.approx(
        math.log(3) + 0.9 * math.log(0.9) + 0.1 * math.log(0.05), rel=1e-5
    )


def test_error_is_that_of_a_mean_over_rows_of_different_length():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (400, 200), generator=draw)
    # A row has a level of its own, which all its tokens share.
    levels = torch.rand(400, 200, generator=draw).square()
    found = [
        over_rows([(float(kl * n), int(n)) for kl, n in zip(*sample, strict=True)])
        for sample in zip(levels, lengths, strict=True)
    ]
    spread = torch.tensor([one.nats for one in found]).std()
    claimed = torch.tensor([one.error for one in found]).mean()
    assert claimed == pytest.approx(float(spread), rel=0.1)


def test_few_rows_tell_little_of_an_error_and_one_nothing():
    assert over_rows([(1.0, 1), (3.0, 1)]) == (2.0, 1.0)
    assert over_rows([(0.5, 2)]) == (0.25, None)


@pytest.mark.parametrize("larger_first", [True, False])
def test_larger_vocabulary_is_restricted_and_renormalised(larger_first):
    large, small = Constant([0.3, 0.1, 0.4, 0.2]), Constant([0.75, 0.25])
    one, two = (large, small) if larger_first else (small, large)
    assert divergence(two, record(one, [Compared(Row([0, 1]))])).nats == pytest.approx(
        0.0, abs=1e-6
    )
    uneven = Constant([0.2, 0.2, 0.4, 0.2])
    one, two = (uneven, small) if larger_first else (small, uneven)
    p, q = ([0.5, 0.5], [0.75, 0.25]) if larger_first else ([0.75, 0.25], [0.5, 0.5])
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert divergence(two, record(one, [Compared(Row([0, 1]))])).nats == pytest.approx(
        expected, rel=1e-5
    )


def test_ids_that_the_other_model_lacks_are_refused():
    reference = record(Constant([0.3, 0.1, 0.4, 0.2]), [Compared(Row([0, 3]))])
    with pytest.raises(DeltaError, match="beyond the 2"):
        divergence(Constant([0.75, 0.25]), reference)


def test_logits_that_are_not_finite_are_refused(model):
    reference = record(model, ROWS)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(DeltaError, match="finite"):
        divergence(model, reference)


def test_no_rows_are_refused(model):
    with pytest.raises(DeltaError, match="at least one row"):
        record(model, [])


def test_question_rows_compare_the_answer_and_its_end():
    tokenizer = make_tokenizer()
    (one,) = question_rows(tokenizer, [Question("1 + 2", "34")])
    assert tokenizer.decode(one.row.ids) == "1 + 234"
    assert len(one.row) - one.first == len("34") + 1  # "3", "4" and the end are predicted


def test_text_rows_are_cut_in_order(tmp_path):
    tokenizer = make_tokenizer()
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij")
    rows = text_rows(tokenizer, path, rows=3, length=4)
    assert [tokenizer.decode(one.row.ids) for one in rows] == ["abcd", "efgh", "ij"]
    assert all(one.first == 0 for one in rows)
    assert len(text_rows(tokenizer, path, rows=2, length=4)) == 2


def test_rows_of_text_begin_as_the_tokenizer_begins_a_text(tmp_path):
    class Beginning:
        """A tokenizer that puts a token before a text, which `make_tokenizer` does not."""

        bos_token_id, plain = 1, make_tokenizer()

        def __call__(self, text, add_special_tokens=True):
            ids = self.plain(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}

    path = tmp_path / "text.txt"
    path.write_text("abcdefgh")
    rows = [one.row.ids for one in text_rows(Beginning(), path, rows=2, length=4)]
    assert [row[0] for row in rows] == [1, 1]
    assert [Beginning.plain.decode(row[1:]) for row in rows] == ["abc", "def"]


def test_default_text_is_there_and_repeats():
    tokenizer = make_tokenizer()
    rows = text_rows(tokenizer, rows=4, length=32)
    again = text_rows(tokenizer, rows=4, length=32)
    assert [one.row.ids for one in rows] == [one.row.ids for one in again]
    assert [len(one.row) for one in rows] == [32] * 4


def test_unreadable_and_empty_text_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    with pytest.raises(DeltaError, match=r"none\.txt"):
        text_rows(tokenizer, tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DeltaError, match=r"empty\.txt"):
        text_rows(tokenizer, tmp_path / "empty.txt")


def test_rows_of_different_lengths_do_not_share_a_pass(model):
    """With a short prompt in a long one's pass, the head would have to answer for all of the long one."""
    asked = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, out: asked.append(out.shape[:2]))
    rows = [Compared(Row([3 + i % 9 for i in range(n + 2)]), n) for n in (40, 2, 41, 3)]
    reference = record(model, rows, batch_size=2)
    hook.remove()
    assert asked == [(2, 3), (2, 3)]
    other = make_model(vocabulary(model), seed=1)
    found = by_row(other, reference)
    assert [n for _, n in found] == [2, 2, 2, 2]
    for row, (kl, _) in zip(rows, found, strict=True):  # in order
        assert kl == pytest.approx(by_row(other, record(model, [row]))[0][0], rel=1e-3)


def test_no_room_on_disk_is_said(model, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match=r"No space left.*take [\d,]+ bytes; set TMPDIR"):
        record(model, ROWS[:1])
