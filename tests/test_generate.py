"""Generation: the cache against no cache, sampling against brute force, seeds, sliding, streaming."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import GPT2, LLAMA

from fmcore.data.tokenizer import ByteTokenizer
from fmcore.errors import InputError
from fmcore.generate import SampleConfig, candidates, choose, complete, generate, stream
from fmcore.models.decoder import Config, Decoder

V, END = 40, 39
CONFIGS = {"gpt2": GPT2, "gqa": LLAMA, "window": replace(LLAMA, window=3), "qk_norm": replace(LLAMA, qk_norm=True)}
GREEDY = SampleConfig(max_tokens=8, temperature=0.0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request):
    return sharp(request.param)


def sharp(config):
    """In fp64, and with large weights, so that the likeliest token depends on all that was read."""
    model = Decoder(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.4)
    return model


def greedy(model, prompt, max_tokens, end=None):
    """Greedy decoding without a cache, by the rule that ``generate`` documents for a full context."""
    context = model.config.context
    seen, new = list(prompt)[-context:], []
    while len(new) < max_tokens:
        token = int(model(torch.tensor([seen]))[0, -1].argmax())
        if token == end:
            break
        new.append(token)
        if len(seen) == context:
            seen = seen[-(context // 2) :] if context > 1 else []
        seen.append(token)
    return new


def test_greedy_equals_decoding_without_a_cache(model):
    got = generate(model, PROMPTS, GREEDY)
    assert got == [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert got == [generate(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in got}) == 4


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_a_full_context_slides(model, length):
    prompts = [[(7 * i + length) % V for i in range(length)], [3, 1, 4]]
    got = generate(model, prompts, replace(GREEDY, max_tokens=45))
    assert got == [greedy(model, prompt, 45) for prompt in prompts]
    assert [len(tokens) for tokens in got] == [45, 45]


@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_tiny_context_slides(context):
    model = sharp(replace(LLAMA, context=context))
    assert generate(model, PROMPTS, GREEDY) == [greedy(model, prompt, 8) for prompt in PROMPTS]


def test_end_stops_one_sequence_and_no_other(model):
    """Whatever token a sequence makes third is named the end: it stops there, and the others where they meet it."""
    free = generate(model, PROMPTS, GREEDY)
    for end in {tokens[2] for tokens in free}:
        prompts = [prompt if prompt[0] == end else [end, *prompt] for prompt in PROMPTS]
        got = generate(model, PROMPTS, GREEDY, end=end)
        assert got == [greedy(model, prompt, 8, end) for prompt in prompts]
        assert got == generate(model, prompts, GREEDY, end=end)
        assert all(end not in tokens for tokens in got)


def test_a_sequence_may_end_at_once():
    model = scripted(b"abc")
    tokenizer = ByteTokenizer()
    assert complete(model, tokenizer, ["abc", "a", "xyz", ""], GREEDY) == ["", "bc", "", "abc"]


def test_an_empty_prompt_is_a_new_document(model):
    assert generate(model, [[]], GREEDY, end=END) == [greedy(model, [END], 8, END)]


def brute(logits, temperature, top_k, top_p):
    """Probabilities by the definition, one token at a time."""
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    order = order[: top_k or len(order)]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass >= top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8, 0.999, 1.0])
def test_probabilities_equal_brute_force(temperature, top_k, top_p):
    logits = torch.randn(5, 7)
    p, ids = candidates(logits, SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p))
    full = torch.zeros(5, 7, dtype=torch.float64)
    full = p if ids is None else full.scatter(1, ids, p)
    want = torch.tensor([brute(row, temperature, top_k, top_p) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(full / full.sum(1, keepdim=True), want)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.6, "temperature": 1.5}])
def test_draws_meet_each_token_as_often_as_it_is_likely(options):
    """Evenly spaced draws: every count is right but for one at each edge."""
    logits = torch.randn(6)
    config = SampleConfig(**options)
    want = brute(logits.tolist(), config.temperature, config.top_k, config.top_p)
    n = 20000
    tokens = choose(logits.expand(n, 6), config, [(i + 0.5) / n for i in range(n)])
    for count, p in zip(torch.bincount(tokens, minlength=6).tolist(), want, strict=True):
        assert abs(count - n * p) <= 2 and (count == 0) == (p == 0)


def test_the_last_draws_meet_a_token_that_can_be():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, 0.0, -math.inf]])
    for options in ({}, {"top_k": 5}, {"top_p": 0.99}, {"temperature": 1e-300}):
        for u in (0.0, 1 - 2**-53, 0.5):
            assert 1 <= choose(logits, SampleConfig(**options), [u]).item() <= 3


def test_a_cold_temperature_is_greedy():
    logits = torch.randn(50, 9)
    draws = torch.rand(50).tolist()
    assert torch.equal(choose(logits, SampleConfig(temperature=1e-6), draws), logits.argmax(1))
    assert torch.equal(choose(logits, SampleConfig(temperature=0.0), draws), logits.argmax(1))
    assert torch.equal(choose(logits, SampleConfig(top_k=1), draws), logits.argmax(1))


SAMPLED = SampleConfig(max_tokens=12, temperature=0.8, top_p=0.95, seed=3)


def test_seeds(model):
    first = generate(model, PROMPTS, SAMPLED)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert generate(model, PROMPTS, SAMPLED) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(model, PROMPTS, replace(SAMPLED, seed=4)) != first
    assert all(len(set(map(tuple, generate(model, [[1, 2]] * 8, replace(SAMPLED, seed=s))))) == 8 for s in range(3))


def test_a_text_does_not_depend_on_its_neighbours(model):
    """Nor on how many go through at a time, nor on how far it goes on."""
    together = generate(model, PROMPTS, SAMPLED)
    assert generate(model, [PROMPTS[0], [30, 31], PROMPTS[2]], SAMPLED)[2] == together[2]
    assert generate(model, PROMPTS[:1], SAMPLED) == together[:1]
    assert generate(model, PROMPTS, replace(SAMPLED, batch=1)) == together
    assert generate(model, PROMPTS, replace(SAMPLED, batch=3)) == together
    assert [tokens[:5] for tokens in together] == generate(model, PROMPTS, replace(SAMPLED, max_tokens=5))


def scripted(text, context=16):
    """A model that knows only where it stands: after i bytes it says byte i of ``text``, and the end after the last."""
    model = Decoder(Config(vocab_size=257, layers=1, width=32, heads=1, ffn=8, context=context, positions="learned"))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.norm.weight.fill_(1.0)
        for i, token in enumerate([*text, 256]):
            model.pos.weight[i, i] = 1.0
            model.head.weight[token, i] = 50.0
    return model


def test_streamed_pieces_hold_whole_characters():
    text = "a\u00e9\u20ac\U0001f600z"
    assert list(stream(scripted(text.encode()), ByteTokenizer(), "", replace(GREEDY, max_tokens=16))) == list(text)


def test_a_broken_character_shows_at_the_end():
    assert list(stream(scripted(b"a\xe2\x82"), ByteTokenizer(), "", GREEDY)) == ["a", "\ufffd"]


def test_stream_equals_complete():
    model, tokenizer = sharp(replace(LLAMA, vocab_size=257)), ByteTokenizer()
    total = 0
    for prompt in ("", "na\u00efve ", "x" * 50):
        for seed in range(3):
            config = SampleConfig(max_tokens=60, temperature=3.0, seed=seed)
            pieces = list(stream(model, tokenizer, prompt, config))
            assert "".join(pieces) == complete(model, tokenizer, [prompt], config)[0] and all(pieces)
            total += len(pieces)
    assert total > 100


def test_stream_comes_as_it_is_made():
    model, calls = scripted(b"abcdef"), []
    hidden = model.hidden
    model.hidden = lambda *args, **kwargs: calls.append(1) or hidden(*args, **kwargs)
    pieces = stream(model, ByteTokenizer(), "", GREEDY)
    assert next(pieces) == "a" and len(calls) == 1
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert next(pieces) == "b" and len(calls) == 2
    pieces.close()
    assert model.training


def test_the_model_stays_as_it_was():
    """Training goes on afterwards, with the modes it had."""
    model = Decoder(LLAMA)
    model.layers[0].eval()
    generate(model, PROMPTS, GREEDY)
    assert model.training and not model.layers[0].training and model.layers[1].training
    tokens = torch.randint(V, (1, 16))
    model.loss(tokens, tokens).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bf16():
    model = Decoder(LLAMA).bfloat16()
    assert [len(tokens) for tokens in generate(model, PROMPTS, replace(SAMPLED, max_tokens=20))] == [20] * 4


def test_no_prompts():
    assert generate(Decoder(LLAMA), [], GREEDY) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_diverged_model_is_named(temperature):
    model = Decoder(LLAMA)
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(InputError, match="generate: the model's logits must be numbers, got nan"):
        generate(model, PROMPTS, SampleConfig(temperature=temperature))
    assert model.training


@pytest.mark.parametrize("prompts, message", [
    ([[1, 40]], "generate: prompt tokens must be below vocab_size=40, got 40; does the tokenizer belong to the model?"),
    ([[-1]], "generate: prompt tokens must be below vocab_size=40, got -1; does the tokenizer belong to the model?"),
    ([[]], "generate: a prompt must have at least one token when no end is given, got none"),
])  # fmt: skip
def test_prompt_errors(prompts, message):
    with pytest.raises(InputError) as e:
        generate(Decoder(LLAMA), prompts, GREEDY)
    assert str(e.value) == message


@pytest.mark.parametrize("options, message", [
    ({"max_tokens": 0}, "generate: max_tokens must be an integer of at least 1, got 0"),
    ({"top_k": -1}, "generate: top_k must be an integer of at least 0, got -1"),
    ({"top_k": 2.5}, "generate: top_k must be an integer of at least 0, got 2.5"),
    ({"seed": -1}, "generate: seed must be an integer of at least 0, got -1"),
    ({"batch": 0}, "generate: batch must be an integer of at least 1, got 0"),
    ({"temperature": -0.1}, "generate: temperature must be 0 (greedy) or more, got -0.1"),
    ({"temperature": math.nan}, "generate: temperature must be 0 (greedy) or more, got nan"),
    ({"temperature": math.inf}, "generate: temperature must be 0 (greedy) or more, got inf"),
    ({"top_p": 0.0}, "generate: top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.5}, "generate: top_p must be above 0 and at most 1, got 1.5"),
])  # fmt: skip
def test_config_errors(options, message):
    with pytest.raises(InputError) as e:
        SampleConfig(**options)
    assert str(e.value) == message
