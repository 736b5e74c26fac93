import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltacome.errors import DeltaError
from deltacome.evals.divergence import Compared, record
from deltacome.evals.positions import learned_positions
from deltacome.evals.prompts import prompt_ids, stop_ids
from deltacome.evals.score import answers, exact_match, generate, greedy, score, wilson
from deltacome.evals.tasks import Question
from deltacome.rows import Row

PROMPTS = ["Sum: 1 + 2", "Spell backward: something long", "x", "Sort up: 3 1 2", "Legs: 2 cats"]


def slow_greedy(model, ids, stops, new):
    """No cache, no batch, no padding."""
    said = []
    for _ in range(new):
        logits = model(torch.tensor([ids + said])).logits
        token = int(logits[0, -1].argmax())
        if token in stops:
            break
        said.append(token)
    return said


def tiny(kind):
    """A random model that says something else after each prompt."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    states = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 4}
    mixers = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
    both = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
    own = {"mamba2": states, "bamba": both | mixers | {"attn_layer_indices": [1]}}
    config = AutoConfig.for_model(kind, **sizes, **own.get(kind, {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3
    return model


@pytest.mark.parametrize(("kind", "learned"), [("gpt2", True), ("opt", True), ("llama", False)])
def test_rows_longer_than_a_table_of_positions(kind, learned):
    """Beyond its end there is nothing to look up; where positions are computed there is no end."""
    sizes = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, max_position_embeddings=16)  # as many as words
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert learned_positions(model) == (16 if learned else None)
    (said,) = greedy(model, [Row([5] * 12)], [], 8)
    assert len(said) == (4 if learned else 8)
    long = Row([5] * 17)
    if learned:
        with pytest.raises(
            DeltaError, match="at most 16 tokens, as many as it has positions, got 18"
        ):
            greedy(model, [long], [], 1)
        with pytest.raises(DeltaError, match="got 17"):
            record(model, [Compared(long)])
    else:
        assert len(greedy(model, [long], [], 1)[0]) == 1
        record(model, [Compared(long)])


class Numbers:
    """In place of a tokenizer: a text is its tokens."""

    eos_token_id = None

    def decode(self, tokens, **options):
        return tokens


def test_batch_equals_one_by_one_without_cache(model, tokenizer):
    # The random model's most frequent token becomes a stop, so that some answers end early.
    stops = [1, 20]
    rows = [Row(prompt_ids(tokenizer, prompt)) for prompt in PROMPTS]
    together = greedy(model, rows, stops, 12)
    assert together == [slow_greedy(model, row.ids, stops, 12) for row in rows]
    assert len({tuple(said) for said in together}) > 1


def test_generate_keeps_the_order_for_any_batch_size(model, tokenizer):
    one = generate(model, tokenizer, PROMPTS, batch_size=1, max_new_tokens=8)
    assert one == generate(model, tokenizer, PROMPTS, batch_size=3, max_new_tokens=8)
    assert one == [generate(model, tokenizer, [p], max_new_tokens=8)[0] for p in PROMPTS]
    assert len(set(one)) > 1


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "bloom", "bamba"])
def test_models_that_cannot_be_told_positions_or_have_states(kind):
    model = tiny(kind)
    prompts = [[3, 4, 5, 6, 7], [8, 9, 10], [11] * 7, [5, 4, 3]]
    rows = [Row(ids) for ids in prompts]
    said = answers(model, Numbers(), rows, batch_size=4, max_new_tokens=8)
    stops = stop_ids(model, Numbers())
    assert said == [slow_greedy(model, row.ids, stops, 8) for row in rows]
    assert len({tuple(one) for one in said}) > 1
    if kind in ("mamba", "bloom"):
        with pytest.raises(DeltaError, match="of one length"):
            greedy(model, rows, stops, 8)


def test_a_model_without_a_cache_is_refused(model):
    model.forward = lambda input_ids, **rest: None
    with pytest.raises(
        DeltaError, match=r"cache_params, got LlamaForCausalLM, which takes input_ids"
    ):
        greedy(model, [Row([3])], [], 4)


def test_stop_token_is_cut_and_nothing_follows(model, tokenizer):
    row = Row(prompt_ids(tokenizer, PROMPTS[0]))
    free = greedy(model, [row], [], 6)[0]
    assert len(free) == 6
    stopped = greedy(model, [row], [free[3]], 6)[0]
    assert stopped == free[: free.index(free[3])]


def test_generation_config_of_the_model_changes_nothing_but_the_end(model, tokenizer):
    before = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.do_sample = True
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == before
    first = tokenizer(before[0])["input_ids"][0]
    model.generation_config.eos_token_id = [1, first]
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8)[0] == ""


def test_chat_template_is_used_when_there_is_one(tokenizer):
    assert tokenizer.decode(prompt_ids(tokenizer, "x")) == "x"
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert tokenizer.decode(prompt_ids(tokenizer, "x")) == "[user]x[assistant]"


def test_empty_prompt_is_refused(model):
    with pytest.raises(DeltaError, match="empty"):
        greedy(model, [Row([3]), Row([])], [1], 4)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("42", True),
        ("  42 \n", True),
        ("42\nBecause 40 + 2 is 42.", True),
        ("42.", False),
        ("The answer is 42", False),
        ("4", False),
        ("", False),
    ],
)
def test_exact_match(said, right):
    assert exact_match(said, "42") is right


def test_exact_match_compares_as_many_lines_as_the_answer_has():
    assert exact_match("a \nb\nc", "a\nb")
    assert not exact_match("a", "a\nb")
    assert exact_match("<answer>3</answer>", "<answer>3</answer>")


def test_wilson_known_values():
    # Textbook values of the score interval (Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29).
    for hits, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_nonsense(hits, n):
    with pytest.raises(DeltaError, match="interval"):
        wilson(hits, n)


def test_score_counts_matches():
    questions = [Question("p", str(i)) for i in range(4)]
    share, low, high = score(["0", "1", "x", "3\nso"], questions)
    assert share == 0.75
    assert (low, high) == wilson(3, 4)
