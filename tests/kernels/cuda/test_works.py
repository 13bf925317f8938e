"""What is folded into what, and which values share memory."""

from __future__ import annotations

from mixbit.kernels import ops
from mixbit.kernels.cuda.works import Work, folded, inputs_of, plain, share_memory
from mixbit.kernels.ops import Program, ProgramBuilder
from mixbit.kernels.spec import BatchMatvecSpec
from tests.kernels.builders import Tensors
from tests.kernels.test_executor import PROGRAM


def kinds(works: tuple[Work, ...]) -> list[str]:
    return [ops.kind(work.node) for work in works]


def chain(*, shared_sum: bool = False) -> Program:
    """embed, product, add and norm, product, add and norm, select."""
    t, b = Tensors(), ProgramBuilder()
    x = b.embed(t.quantized(8, 32, bits=4))
    (delta,) = b.batch_matvec(x, BatchMatvecSpec(t.quantized(32, 32, bits=4)))
    total, normed = b.add_norm(x, delta, t.norm(32))
    (out,) = b.batch_matvec(normed, BatchMatvecSpec(t.quantized(32, 32, bits=4)))
    if shared_sum:
        out, _ = b.add_norm(out, delta, t.norm(32))
    _, last = b.add_norm(total, out, t.norm(32))
    return b.build(b.select_rows(last))


def test_plain_work_is_one_for_each_node() -> None:
    works = plain(PROGRAM)
    assert [work.node for work in works] == list(PROGRAM.nodes)
    assert all(work.reads == inputs_of(work.node) and work.writes == ops.outputs_of(work.node) for work in works)


def test_sums_and_norms_are_folded_into_products() -> None:
    program = chain()
    works = folded(program)
    assert kinds(works) == ["embed", "batch_matvec", "batch_matvec", "rms_norm", "select_rows"]
    first, second = works[1], works[2]
    embed, added = program.nodes[0], program.nodes[2]
    assert isinstance(embed, ops.Embed)
    assert isinstance(added, ops.AddNorm)
    assert first.residual is embed.out
    assert first.writes == (added.total,)
    assert first.reads == (embed.out, embed.out)
    assert second.norm is added.norm
    assert second.reads == (added.total, added.total)
    assert second.writes == (works[3].reads[0],)


def test_a_summand_that_others_read_is_not_folded() -> None:
    works = folded(chain(shared_sum=True))
    assert kinds(works).count("add_norm") == 3
    first = works[1]
    assert first.residual is None
    assert first.writes == ops.outputs_of(first.node)


def test_every_value_is_made_before_it_is_read() -> None:
    for works in (plain(PROGRAM), folded(PROGRAM)):
        made: set[ops.Value] = set()
        for work in works:
            assert made.issuperset(work.reads)
            made.update(work.writes)
        assert PROGRAM.logits in made


def test_values_that_live_together_lie_apart() -> None:
    for works in (plain(PROGRAM), folded(PROGRAM), folded(chain())):
        logits = works[-1].writes[-1]
        places, dims = share_memory(works, logits)
        last = {value: i for i, work in enumerate(works) for value in (*work.reads, *work.writes)}
        holder: dict[int, ops.Value] = {}
        for i, work in enumerate(works):
            for value in work.reads:
                assert holder[places[value]] is value
            for value in work.writes:
                former = holder.get(places[value])
                assert former is None or last[former] < i
                assert dims[places[value]] >= value.dim
                holder[places[value]] = value
        assert len(dims) < len(places)
