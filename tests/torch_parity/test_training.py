"""What training/ trains is what this project runs, its fast forms compute what the plain ones do, and a run can go on
where another stopped."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch  # type: ignore[import-not-found]
from safetensors.torch import save_file

from mixbit.engine.loader import load
from mixbit.kernels.registry import choose
from tests.sequence import Sequence

TRAINING = Path(__file__).parents[2] / "training"
TOLERANCE = 1e-4  # of the logits' standard deviation


@pytest.fixture(scope="module", autouse=True)
def importable() -> Any:
    sys.path.insert(0, str(TRAINING))
    yield
    sys.path.remove(str(TRAINING))


def test_logits_of_the_exported_checkpoint(tmp_path: Path) -> None:
    from model import Config, TinyCoder  # type: ignore[import-not-found]

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "full_attention_interval": 2, "num_experts": 8}
    config = Config(vocab_size=512, max_position_embeddings=128, **sizes)
    model = TinyCoder(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(0.1 * torch.randn_like(value))
            if not name.endswith("A_log"):
                value.copy_(value.bfloat16().float())  # as the checkpoint holds it
        tokens = torch.randint(0, 512, (1, 50))
        expected = model(tokens)[0][0].numpy()
    save_file(model.checkpoint(), tmp_path / "model.safetensors", metadata={"format": "mlx"})
    (tmp_path / "config.json").write_text(config.document())
    actual = Sequence(choose("cpu").backend, load(tmp_path).program, 64).run(tokens[0].tolist())
    assert np.abs(actual - expected).max() / expected.std() < TOLERANCE


def tiny(**sizes: Any) -> Any:
    from model import Config

    small = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "full_attention_interval": 2}
    small |= {"num_experts": 8, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    return Config(**{**small, "max_position_embeddings": 128, **sizes})


def test_every_parameter_learns() -> None:
    from model import TinyCoder

    torch.manual_seed(1)
    model = TinyCoder(tiny(num_experts=4))
    tokens = torch.randint(0, 64, (2, 40))
    loss, router, counts = model(tokens, tokens)
    (loss + router).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert counts.sum().item() == 2 * 2 * 40 * 4  # layers, sequences, tokens, experts of a token


@pytest.mark.filterwarnings("ignore")  # of torch's own tracing
def test_compiled_layers_are_whole_graphs_and_compute_the_same() -> None:
    """Traced forward and backward as for a GPU; a backend that generates no code stands for the compiler."""
    from model import TinyCoder

    results = []
    for compiled in (False, True):
        torch.manual_seed(4)
        model = TinyCoder(tiny(), torch.bfloat16)
        if compiled:
            model.compile_parts(backend="aot_eager")
        tokens = torch.randint(0, 300, (2, 128))
        loss, router, _ = model(tokens, tokens.roll(-1, 1))
        (loss + router).backward()
        results.append({"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()})
    plain, traced = results
    for name, value in plain.items():
        assert (traced[name] - value).norm() < 0.05 * value.norm() + 1e-6, name  # bfloat16


def test_fast_forms_have_the_gradients_of_the_plain_ones() -> None:
    from dry_run import parity  # type: ignore[import-not-found]

    for part, difference in parity(torch.device("cpu"), torch.float32).items():
        assert difference < 1e-5, part


@pytest.mark.parametrize("tokens", [1, 63, 64, 150])
def test_delta_rule_in_chunks(tokens: int) -> None:
    from delta import chunked_delta_rule, delta_rule  # type: ignore[import-not-found]

    torch.manual_seed(2)
    q, k, v = (torch.randn(2, tokens, heads, 16) for heads in (2, 2, 4))
    g, beta = -5 * torch.rand(2, tokens, 4), torch.rand(2, tokens, 4)
    k[:, 1::2] = k[:, ::2][:, : tokens // 2]  # equal keys: what an inverse by powers would lose
    torch.testing.assert_close(chunked_delta_rule(q, k, v, g, beta), delta_rule(q, k, v, g, beta), atol=1e-5, rtol=1e-4)


def test_the_router_loss_spreads_the_load() -> None:
    from model import TinyCoder

    torch.manual_seed(3)
    model = TinyCoder(tiny())
    tokens = torch.randint(0, 300, (4, 128))
    with torch.no_grad():
        model.embed_tokens.weight += 0.2  # the same direction in every token, which four experts of each layer like
        for layer in model.layers:
            layer.mlp.gate.weight[:4] += 0.02
    optimizer = torch.optim.Adam([layer.mlp.gate.weight for layer in model.layers], 0.01)
    spreads = []
    for _ in range(60):
        _, router, counts = model(tokens)
        optimizer.zero_grad()
        router.backward()
        optimizer.step()
        spreads.append(float((counts.amax(1) / counts.float().mean(1)).max()))
    assert spreads[0] > 1.3
    assert spreads[-1] < 1.0 + (spreads[0] - 1.0) / 2
    assert (counts > 0).all()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Data and a tokenizer for a run of a minute's fraction."""
    from samples import train_tokenizer  # type: ignore[import-not-found]

    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    texts = [source.read_text() for source in sources[:2]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(iter(texts), 300).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_pass_depends_on_its_number_alone(work: Path) -> None:
    from samples import MIDDLE, PREFIX, SUFFIX, write_pass
    from tokenizers import Tokenizer

    first = write_pass(work, 0).read_bytes()
    (work / "tokens-0.u16").unlink()
    assert write_pass(work, 0).read_bytes() == first
    assert write_pass(work, 1).read_bytes() != first
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    counts = np.bincount(np.frombuffer(first, np.uint16), minlength=300)
    marks = {int(counts[tokenizer.token_to_id(mark)]) for mark in (PREFIX, SUFFIX, MIDDLE)}
    assert len(marks) == 1  # each hole has all three
    assert 0.3 < marks.pop() / counts[tokenizer.token_to_id("<|endoftext|>")] < 0.7


def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(work: Path) -> None:
    from optim import Plan  # type: ignore[import-not-found]
    from train import Batches, Trainer  # type: ignore[import-not-found]

    plan, cpu = Plan(batch=4, warmup=2), torch.device("cpu")

    def steps(trainer: Any, batches: Any, until: int) -> None:
        while trainer.step < until:
            trainer.train(batches(trainer.step), trainer.step / 12)

    whole, batches = Trainer(tiny(), plan, cpu), Batches(work, 128, 4, 0)
    per_pass = len(batches._order) // 4
    steps(whole, batches, per_pass + 2)  # into the second pass
    batches.close()
    begun, batches = Trainer(tiny(), plan, cpu), Batches(work, 128, 4, 0)
    steps(begun, batches, per_pass + 1)
    begun.save(work / "state.pt", 3.5, batches.position)
    batches.close()
    again = Trainer(tiny(), plan, cpu)
    spent, position = again.load(work / "state.pt")
    assert (spent, position) == (3.5, (1, per_pass))
    batches = Batches(work, 128, 4, 0, position)
    steps(again, batches, per_pass + 2)
    batches.close()
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_learns_and_ends_with_a_checkpoint(work: Path) -> None:
    from optim import Plan, Steps
    from train import Trainer, run

    trainer = Trainer(tiny(), Plan(batch=4, warmup=5), torch.device("cpu"))
    assert run(work, trainer, Steps(40), 1e9)
    log = np.loadtxt(work / "out" / "loss.csv", delimiter=",", skiprows=1)
    assert log[:, 0].tolist() == [20, 40]
    assert log[1, 1] < log[0, 1] < np.log(300)
    assert load(work / "out").vocab_size == 300


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 3, 24, 40)])
def test_steps_of_muon_are_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    from optim import orthogonalized

    torch.manual_seed(5)
    singular = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_the_rate_ends_where_the_time_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import optim
    from optim import Minutes, Plan, rate_at

    now = 100.0
    monkeypatch.setattr(optim.time, "monotonic", lambda: now)
    schedule, plan = Minutes(2), Plan(warmup=10)
    schedule.spent = 60.0  # of an earlier command
    assert schedule.done(0) == 0.5
    now += 60
    assert schedule.done(0) == 1.0
    rates = [rate_at(100, done, plan) for done in (0, 0.5, 1, 2)]
    assert rates == pytest.approx([1, (1 + plan.final) / 2, plan.final, plan.final])
    assert rate_at(0, 0, plan) == pytest.approx(0.1)


def test_filled_holes_are_the_text() -> None:
    from samples import MIDDLE, PREFIX, SUFFIX, arrange, pieces

    text, with_holes = "def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n" * 300, 0
    assert "".join(pieces(text)) == text
    for seed in range(200):
        whole = ""
        for sample in arrange(text[:900], random.Random(seed)):
            if sample.startswith(PREFIX):
                before, rest = sample.removeprefix(PREFIX).split(SUFFIX)
                after, middle = rest.split(MIDDLE)
                whole += before + middle + after
            else:
                whole += sample
        assert whole == text[:900]
        with_holes += sample.startswith(PREFIX)
    assert 60 < with_holes < 140  # half of them


def test_few_holes_begin_inside_an_indentation() -> None:
    from samples import holes

    text = "class A:\n    def f(self, x):\n        return x + 1\n\n" * 20
    inside = 0
    for seed in range(400):
        start, end = holes(text, random.Random(seed))
        assert 0 <= start <= end <= len(text)
        line = text.rfind("\n", 0, start) + 1
        inside += not text[line:start].strip() and text[start : start + 1] == " "
    assert inside < 40
