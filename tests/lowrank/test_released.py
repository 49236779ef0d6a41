"""The released files import to what the authors' code computes, and nothing in them is run."""

import io
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from flora.errors import InputError
from flora.lowrank.materialize import materialize
from flora.lowrank.released import (
    LEAVES,
    make_compact,
    make_elastic,
    ranks_from_svd_config,
    read_released,
    space_from_pickle,
    timm_state,
)
from flora.lowrank.supernet import active_ranks
from flora.lowrank.targets import find_targets, trace_cost
from flora.ranks.cost import LayerShape, ModelCost, Rank
from flora.ranks.paper import DEIT_B_8G, DEIT_S_2G7
from tests.samples import IMAGE, random_images, random_ranks, tiny_model

RELEASED = ("deit", "swin")
LAYER = "blocks.0.attn.qkv"


def supernet_state(model: nn.Module) -> dict[str, Tensor]:
    """A supernet of `model` by the released recipe: numpy's SVD of the transposed weight, S on the narrow side."""
    state: dict[str, Tensor] = {}
    for name, tensor in {**model.state_dict(), **_swin_buffers(model)}.items():
        layer, _, leaf = _old_name(name).rpartition(".")
        if layer.rpartition(".")[2] not in ("qkv", "fc1", "fc2"):
            state[f"{layer}.{leaf}" if layer else leaf] = tensor
        elif leaf == "bias":
            state[f"{layer}.U.bias"] = tensor
        else:
            left, singular, right = np.linalg.svd(tensor.numpy().T, full_matrices=True)
            full = min(tensor.shape)
            first, second = left[:, :full].T, right[:full].T
            if layer.endswith("fc2"):
                second = second * singular
            else:
                first = singular[:, None] * first
            state[f"{layer}.VT.weight"] = torch.from_numpy(first.copy())
            state[f"{layer}.U.weight"] = torch.from_numpy(second.copy())
    return state


def subnet_state(supernet: Mapping[str, Tensor], ranks: Mapping[str, Rank]) -> dict[str, Tensor]:
    """The released slicing: pairs cut at their rank, and one `fc` where the ratio is 1."""
    state = dict(supernet)
    for layer, rank in ranks.items():
        if rank == "dense":
            state[f"{layer}.fc.weight"] = state.pop(f"{layer}.U.weight") @ state.pop(f"{layer}.VT.weight")
            state[f"{layer}.fc.bias"] = state.pop(f"{layer}.U.bias")
        else:
            state[f"{layer}.VT.weight"] = state[f"{layer}.VT.weight"][:rank].clone()
            state[f"{layer}.U.weight"] = state[f"{layer}.U.weight"][:, :rank].clone()
    return state


def _old_name(name: str) -> str:
    """timm's name of today in the released layout: Swin's merging a stage earlier, its head without `fc`."""
    name = re.sub(r"^layers\.(\d+)\.downsample", lambda stage: f"layers.{int(stage[1]) - 1}.downsample", name)
    return name.replace("head.fc.", "head.")


def _swin_buffers(model: nn.Module) -> dict[str, Tensor]:
    kinds = ("relative_position_index", "attn_mask")
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(kinds)}


def written(path: Path, state: Mapping[str, Tensor], **extra: object) -> Path:
    torch.save({"model": dict(state), **extra}, path)
    return path


def cost_of(model: nn.Module) -> ModelCost:
    return trace_cost(model, find_targets(model), IMAGE)


@torch.no_grad()
def truncated(family: str, ranks: Mapping[str, Rank]) -> nn.Module:
    """The plain timm model whose weights are cut at `ranks` by torch's SVD in double precision."""
    model = tiny_model(family)
    for name, rank in ranks.items():
        if rank != "dense":
            layer = model.get_submodule(name)
            left, singular, right = torch.linalg.svd(layer.weight.double(), full_matrices=False)
            layer.weight.copy_((left[:, :rank] * singular[:rank]) @ right[:rank])
    return model


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module) -> float:
    images = random_images(3, seed=5)
    return (one(images) - other(images)).abs().max().item()


@pytest.fixture(params=RELEASED)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def _import(path: Path, family: str = "deit"):
    model = tiny_model(family, seed=9)
    return model, read_released(path, model)


# Checkpoints


def test_a_released_supernet_equals_the_dense_model_at_full_rank(family: str, tmp_path: Path):
    dense = tiny_model(family)
    state = supernet_state(dense)
    model, released = _import(written(tmp_path / "supernet.pth", state, optimizer={"lr": 0.1}, epoch=3), family)
    assert released.is_supernet
    assert list(released.ranks) == list(find_targets(dense))
    assert difference(model, dense) < 1e-5
    make_elastic(model, released)
    assert difference(model, dense) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_a_released_supernet_equals_the_truncated_model_at_any_ranks(family: str, tmp_path: Path, seed: int):
    dense = tiny_model(family)
    model, released = _import(written(tmp_path / "supernet.pth", supernet_state(dense)), family)
    make_elastic(model, released)
    ranks = random_ranks(cost_of(dense), seed)
    with active_ranks(model, ranks):
        assert difference(model, truncated(family, ranks)) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_a_released_subnet_equals_the_supernet_at_its_ranks(family: str, tmp_path: Path, seed: int):
    dense = tiny_model(family)
    cost = cost_of(dense)
    state, ranks = supernet_state(dense), random_ranks(cost, seed)
    supernet, released = _import(written(tmp_path / "supernet.pth", state), family)
    make_elastic(supernet, released)
    model, subnet = _import(written(tmp_path / "subnet.pth", subnet_state(state, ranks)), family)
    assert (subnet.is_supernet, subnet.ranks) == (False, ranks)
    make_compact(model, subnet)
    expected = materialize(supernet, ranks)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.state_dict().items()
    }
    assert difference(model, expected) < 1e-5


def test_a_subnet_without_low_rank_is_the_dense_model(family: str, tmp_path: Path):
    dense = tiny_model(family)
    state = subnet_state(supernet_state(dense), cost_of(dense).dense_ranks)
    model, released = _import(written(tmp_path / "subnet.pth", state), family)
    assert set(released.ranks.values()) == {"dense"}
    assert not released.is_supernet
    make_compact(model, released)
    assert difference(model, dense) < 1e-5


def test_the_spectrum_holds_the_squared_singular_values(tmp_path: Path):
    model, released = _import(written(tmp_path / "supernet.pth", supernet_state(tiny_model("deit"))))
    spectra = make_elastic(model, released)
    for name, layer in find_targets(tiny_model("deit")).items():
        expected = torch.linalg.svdvals(layer.weight.detach().double()).square()
        assert torch.allclose(torch.tensor(spectra[name], dtype=torch.float64), expected, rtol=1e-4)


def test_swin_names_are_moved_as_timm_moves_those_of_its_time():
    model = tiny_model("swin")
    old = {_old_name(name): tensor for name, tensor in {**model.state_dict(), **_swin_buffers(model)}.items()}
    assert "layers.0.downsample.reduction.weight" in old
    assert any(name.endswith("attn_mask") for name in old)
    expected = checkpoint_filter_fn(old, model)
    assert {name: id(tensor) for name, tensor in timm_state(old, model, origin="x").items()} == {
        name: id(tensor) for name, tensor in expected.items()
    }


def test_a_swin_of_todays_timm_keeps_its_names():
    model = tiny_model("swin")
    assert timm_state(model.state_dict(), model, origin="x").keys() == model.state_dict().keys()


def test_windows_that_count_otherwise_are_refused(tmp_path: Path):
    state = supernet_state(tiny_model("swin"))
    name = "layers.0.blocks.0.attn.relative_position_index"
    state[name] = state[name].flip(0)
    with pytest.raises(InputError, match=rf"{name} belongs to another window"):
        _import(written(tmp_path / "supernet.pth", state), "swin")


def _without_factor(state: dict[str, Tensor]) -> None:
    del state[f"{LAYER}.VT.weight"]


def _with_both(state: dict[str, Tensor]) -> None:
    state[f"{LAYER}.fc.weight"] = state[f"{LAYER}.U.weight"] @ state[f"{LAYER}.VT.weight"]


def _of_two_ranks(state: dict[str, Tensor]) -> None:
    state[f"{LAYER}.VT.weight"] = state[f"{LAYER}.VT.weight"][:20]


def _with_two_pairs(state: dict[str, Tensor]) -> None:
    for leaf in ("VT", "U"):
        state[f"{LAYER}.{leaf}.0.weight"] = state.pop(f"{LAYER}.{leaf}.weight")


def _with_another_block(state: dict[str, Tensor]) -> None:
    state["blocks.2.attn.qkv.VT.weight"] = state[f"{LAYER}.VT.weight"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without_factor, rf"{LAYER} has U.weight, U.bias; allowed are VT and U"),
        (_with_both, rf"{LAYER} has VT.weight, U.weight, U.bias, fc.weight"),
        (_of_two_ranks, r"VT \[20, 48\] and U \[144, 48\]"),
        (_with_two_pairs, "CHOICES_BLOCK_CONFIG"),
        (_with_another_block, r"unexpected: blocks\.2\.attn\.qkv\.VT\.weight"),
    ],
)
def test_factors_that_do_not_fit_are_refused_by_name(change, says: str, tmp_path: Path):
    state = supernet_state(tiny_model("deit"))
    change(state)
    with pytest.raises(InputError, match=says):
        _import(written(tmp_path / "supernet.pth", state))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    path = written(tmp_path / "supernet.pth", supernet_state(tiny_model("deit")))
    with pytest.raises(InputError, match=r"does not fit the model; keys missing: .*layers\.0"):
        _import(path, "swin")


def test_plain_weights_are_sent_to_build(tmp_path: Path):
    with pytest.raises(InputError, match="flora build NAME --checkpoint"):
        _import(written(tmp_path / "dense.pth", tiny_model("deit").state_dict()))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, share: float):
    path = written(tmp_path / "supernet.pth", supernet_state(tiny_model("deit")))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match=r"supernet\.pth"):
        _import(path)


class CfgNode(dict):
    """Stands for yacs' class of this name, which the released training code pickles beside the weights."""


CfgNode.__module__ = "yacs.config"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_config_in_the_checkpoint_is_refused_with_a_way_out(tmp_path: Path, monkeypatch, zipped: bool):
    config = ModuleType("yacs.config")
    config.CfgNode = CfgNode
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", config)
        content = {"model": supernet_state(tiny_model("deit")), "config": CfgNode(SEED=0)}
        torch.save(content, tmp_path / "supernet.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"\(yacs\.config\.CfgNode\).*torch\.save\(\{'model'"):
        _import(tmp_path / "supernet.pth")


# Rank configs


def deit_cost(width: int, depth: int = 12) -> ModelCost:
    kinds = {"attn.qkv": (width, 3 * width), "mlp.fc1": (width, 4 * width), "mlp.fc2": (4 * width, width)}
    return ModelCost(
        layers=tuple(
            LayerShape(name=f"blocks.{i}.{kind}", in_features=shape[0], out_features=shape[1], tokens=197)
            for i in range(depth)
            for kind, shape in kinds.items()
        ),
        fixed_macs=0,
        fixed_params=0,
    )


def released_yaml(path: Path, width: int, blocks, **more: object) -> Path:
    """A yaml as the authors' code prints it."""
    config = [[rank / width for rank in block] for block in blocks]
    text = "".join(f"    {key}: {value}\n" for key, value in {"EMBED_DIM": width, **more, "SVD_CONFIG": config}.items())
    path.write_text(f"MODEL:\n  DEIT:\n{text}  NAME: subnet\n  TYPE: lr_deit_subnet\n")
    return path


@pytest.mark.parametrize(("width", "blocks"), [(384, DEIT_S_2G7), (768, DEIT_B_8G)])
def test_the_released_yaml_files_give_the_released_ranks(width: int, blocks, tmp_path: Path):
    ranks = ranks_from_svd_config(released_yaml(tmp_path / "subnet.yml", width, blocks), deit_cost(width))
    flat = [rank for block in blocks for rank in block]
    assert list(ranks.values()) == ["dense" if rank == width else rank for rank in flat]


def test_a_printed_third_is_a_third(tmp_path: Path):
    """The figures as they stand in the released file: 16 digits, not fractions."""
    (tmp_path / "subnet.yml").write_text(
        "MODEL: {DEIT: {SVD_CONFIG: "
        "[[0.16666666666666666, 0.8333333333333334, 0.3333333333333333], [1.0, null, None]]}}"
    )
    ranks = ranks_from_svd_config(tmp_path / "subnet.yml", deit_cost(384, depth=2))
    assert list(ranks.values()) == [64, 320, 128, "dense", "dense", "dense"]


def test_swin_ratios_are_nested_in_stages(tmp_path: Path):
    (tmp_path / "subnet.yml").write_text(
        "MODEL: {SWIN: {EMBED_DIM: 24, SVD_CONFIG: [[[.25, .5, 1], [.5, .25, .75]], [[1, .25, .5], [.25, .25, .25]]]}}"
    )
    cost = cost_of(tiny_model("swin"))
    ranks = ranks_from_svd_config(tmp_path / "subnet.yml", cost)
    assert list(ranks) == list(cost.shapes)
    assert list(ranks.values()) == [6, 12, "dense", 12, 6, 18, "dense", 12, 24, 12, 12, 12]


NOT_FOR_DEIT_S = {
    "another depth": (lambda path: released_yaml(path, 384, DEIT_S_2G7[:6]), r"another depth.* 6 blocks.* 12"),
    "another width": (lambda path: released_yaml(path, 768, DEIT_B_8G), "width 768, this one has width 384"),
    "two ratios": (lambda path: released_yaml(path, 384, [[64, 64]] * 12), "one ratio for each"),
    "a ratio of 2": (lambda path: released_yaml(path, 384, [[64, 64, 768]] * 12), "ratio 2.0"),
    "below one component": (lambda path: released_yaml(path, 384, [[64, 64, 0.1]] * 12), "below one component"),
    "of a Swin": (
        lambda path: _text(path, "MODEL: {SWIN: {SVD_CONFIG: [[[1, 1, 1]]]}}"),
        r"no MODEL\.DEIT\.SVD_CONFIG",
    ),
    "of a supernet": (lambda path: _text(path, "MODEL: {TYPE: lr_deit}"), r"no MODEL\.DEIT\.SVD_CONFIG"),
    "a list": (lambda path: _text(path, "[1, 2]"), r"no MODEL\.DEIT\.SVD_CONFIG"),
    "no nesting": (lambda path: _text(path, "MODEL: {DEIT: {SVD_CONFIG: 0.5}}"), "another depth"),
    "flat": (lambda path: _text(path, f"MODEL: {{DEIT: {{SVD_CONFIG: {[0.5] * 12}}}}}"), "one ratio for each"),
    "words": (lambda path: _text(path, "MODEL: {DEIT: {SVD_CONFIG: [half]}}"), "another depth"),
    "no yaml": (lambda path: _text(path, "MODEL: [unclosed"), "no plain yaml"),
    "a date that is none": (lambda path: _text(path, "MODEL: 2001-99-99"), "no plain yaml"),
    "a call": (lambda path: _text(path, "MODEL: !!python/object/apply:os.system ['true']"), "no plain yaml"),
    "nested without end": (lambda path: _text(path, "[" * 5000), "no plain yaml"),
    "laughing a billion times": (
        lambda path: _text(
            path,
            "a0: &a0 [1, 1]\n"
            + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
            + "MODEL: {DEIT: {SVD_CONFIG: ["
            + ", ".join(["*a59"] * 12)
            + "]}}",
        ),
        r"\(list of 2\) for .*one ratio for each",
    ),
    "nothing there": (lambda path: path, "does not exist"),
    "too large": (lambda path: _text(path, "#" * 2**21), "bytes"),
}


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(("write", "says"), NOT_FOR_DEIT_S.values(), ids=NOT_FOR_DEIT_S)
def test_a_yaml_that_does_not_fit_is_refused(write, says: str, tmp_path: Path):
    with pytest.raises(InputError, match=says):
        ranks_from_svd_config(write(tmp_path / "subnet.yml"), deit_cost(384))


# Search spaces


def released_space(blocks: list[list[tuple[float, ...]]], kind=np.float64) -> list[list[tuple]]:
    """Candidates as the authors' filter leaves them: a ratio for every layer, 1 outside the block."""
    ones = [kind(1.0)] * 3 * len(blocks)
    return [
        [(*ones[: 3 * i], *map(kind, candidate), *ones[3 * i + 3 :]) for candidate in block]
        for i, block in enumerate(blocks)
    ]


def _tuples(depth: int) -> tuple:
    """A tuple of twice the same tuple, `depth` times: small to store, endless to walk."""
    nested: tuple = (1, 1)
    for _ in range(depth):
        nested = (nested, nested)
    return nested


TWO_BLOCKS = [[(0.25, 0.5, 0.5), (0.5, 0.25, 0.25)], [(0.25, 0.25, 0.25), (1.0, 1.0, 1.0), (0.75, 1.0, 0.25)]]


def _dumped(path: Path, content: object, *, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    return _dumped(tmp_path / "space.pickle", released_space(TWO_BLOCKS))


@pytest.mark.parametrize("kind", [np.float64, np.float32, float])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_pickled_space_gives_its_candidates_and_the_ends(tmp_path: Path, kind, protocol: int):
    path = _dumped(tmp_path / "space.pickle", released_space(TWO_BLOCKS, kind), protocol=protocol)
    space = space_from_pickle(path, deit_cost(384, depth=2))
    dense = ("dense", "dense", "dense")
    # 0.75 of 384 is the break-even rank of qkv, so that (0.75, 1, 0.25) and (1, 1, 0.25) are one candidate.
    assert space.candidates == (
        ((96, 96, 96), (192, 96, 96), (96, 192, 192), dense),
        ((96, 96, 96), ("dense", "dense", 96), dense),
    )
    assert space.choices["blocks.0.attn.qkv"] == (96, 192, "dense")
    assert space.choices["blocks.1.attn.qkv"] == (96, "dense")


def test_a_pickle_of_numpy_1_names_another_module(tmp_path: Path):
    content = pickle.dumps(released_space(TWO_BLOCKS), protocol=3)
    assert b"cnumpy._core.multiarray\nscalar\n" in content
    one, two = tmp_path / "numpy1.pickle", tmp_path / "numpy2.pickle"
    one.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    two.write_bytes(content)
    cost = deit_cost(384, depth=2)
    assert space_from_pickle(one, cost) == space_from_pickle(two, cost)


def test_candidates_ascend_in_cost(tmp_path: Path):
    rng = np.random.default_rng(0)
    grid = [tuple(rng.choice([0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0], 3)) for _ in range(103)]
    cost = deit_cost(768, depth=2)
    space = space_from_pickle(_dumped(tmp_path / "space.pickle", released_space([grid, grid])), cost)
    for block, candidates in zip(space.blocks, space.candidates, strict=True):
        macs = [sum(cost.shapes[name].macs(rank) for name, rank in zip(block, c, strict=True)) for c in candidates]
        assert macs == sorted(macs)
    assert space.choices["blocks.0.attn.qkv"] == (96, 192, 288, 384, 480, "dense")
    assert space.choices["blocks.0.mlp.fc1"] == (96, 192, 288, 384, 480, 576, "dense")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (released_space(TWO_BLOCKS[:1]), "holds 1 blocks, this model has 2"),
        ([0.5, 0.5], "a list of 1 to"),
        ([[], []], "a list of 1 to"),
        ([[(0.5,) * 3]] * 2, "6 ratios"),
        ([[(0.5,) * 6]] * 2, "outside its block"),
        (released_space([[(0.5, 0.5, 1.5)]] * 2), "rank ratio 1.5"),
        (released_space([[(0.5, 0.5, float("nan"))]] * 2), "rank ratio nan"),
        ([[(True, True, True, 1, 1, 1)]] * 2, "rank ratio True"),
        ([[("1", 1, 1, 1, 1, 1)]] * 2, "rank ratio '1'"),
        ({"blocks": []}, "a dictionary or a set"),
        (7, "holds 7"),
        (_tuples(60), "6 ratios"),
        ([[(_tuples(60),) * 6]] * 2, "outside its block"),
        ([[(_tuples(60), 1, 1, 1, 1, 1)]] * 2, "rank ratio (tuple of 2)"),
        ([[(10**9999, 1, 1, 1, 1, 1)]] * 2, "rank ratio (int)"),
    ],
)
def test_a_pickle_that_is_no_such_space_is_refused(tmp_path: Path, content: object, says: str):
    with pytest.raises(InputError, match=re.escape(says)):
        space_from_pickle(_dumped(tmp_path / "space.pickle", content), deit_cost(384, depth=2))


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def _nasty_scalar(kind: str, data: object) -> bytes:
    """A numpy scalar of any type, built by hand: numpy itself would not pickle it so."""
    pickler_output = io.BytesIO()
    pickler_output.write(b"\x80\x03cnumpy.core.multiarray\nscalar\n")
    pickler_output.write(b"cnumpy\ndtype\n" + pickle.dumps((kind, False, True), protocol=3)[2:-1] + b"R")
    pickler_output.write(pickle.dumps(data, protocol=3)[2:-1] + b"\x86R.")
    return pickler_output.getvalue()


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("wrapped", [lambda call: call, lambda call: [[(call,) * 6]] * 2], ids=["bare", "nested"])
@pytest.mark.parametrize(
    ("function", "named"),
    [(os.system, r"(posix|nt)\.system"), (eval, r"(builtins|__builtin__)\.eval"), (os.mkdir, r"(posix|nt)\.mkdir")],
)
def test_a_pickle_that_calls_is_refused_and_nothing_runs(tmp_path: Path, protocol, wrapped, function, named: str):
    made = tmp_path / "made"
    argument = {os.system: f"mkdir {made}", eval: f"__import__('os').mkdir({str(made)!r})", os.mkdir: str(made)}
    path = _dumped(tmp_path / "space.pickle", wrapped(Call(function, argument[function])), protocol=protocol)
    with pytest.raises(InputError, match=f"asks for {named}"):
        space_from_pickle(path, deit_cost(384, depth=2))
    assert not made.exists()
    pickle.loads(path.read_bytes())
    assert made.exists(), "the pickle does run where it is let"


def _array() -> bytes:
    return pickle.dumps(np.ones(3))


HOSTILE = {
    "an array": (_array(), "_reconstruct"),
    "an object scalar": (_nasty_scalar("O8", b"\0" * 8), "'O8'"),
    "a scalar of text": (_nasty_scalar("U8", b"\0" * 32), "'U8'"),
    "a scalar of fields": (_nasty_scalar("V8", b"\0" * 8), "'V8'"),
    "a scalar of too few bytes": (_nasty_scalar("f8", b"\0" * 4), "no pickle of a search space"),
    "a scalar of no bytes": (_nasty_scalar("f8", [1]), "no number"),
    "a type that is no name": (_nasty_scalar(["f8"], b"\0" * 8), r"type \(list of 1\)"),
    "a type that hashes without end": (_nasty_scalar(_tuples(60), b"\0" * 8), r"type \(tuple of 2\)"),
    "an inner attribute": (b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", r"numpy\.dtype\.__init__"),
    "a state set on the maker": (b"\x80\x03cnumpy.core.multiarray\nscalar\nN]\x86b.", "no pickle of a search space"),
    "a persistent name": (b"\x80\x03X\x01\x00\x00\x00aQ.", "no pickle of a search space"),
    "an extension": (b"\x80\x03\x82\x01.", "no pickle of a search space"),
    "a memo of four billion": (b"\x80\x03]r\xff\xff\xff\xff.", "memo 4294967295"),
    "a memo in text": (b"\x80\x03]p9999999999\n.", "memo 9999999999"),
    "bytes of 2**60": (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".", "no pickle of a search space"),
    "a bytearray of 2**60": (b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b".", "no pickle of a search space"),
    "a frame of 2**60": (b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"].", "no pickle of a search space"),
    "an object with a state": (pickle.dumps(os.stat_result(range(10))), r"os\.stat_result"),
    "an object of attributes": (pickle.dumps(nn.Identity()), r"after asking for torch\.nn\.modules\.linear\.Identity"),
    "a key that hashes without end": (
        b"\x80\x03}K\x01" + b"".join(b"\x85q%c" % i + b"h%c\x86" % i for i in range(60)) + b"K\x01s.",
        "a dictionary or a set",
    ),
    "text": (b"no pickle at all", "no pickle of a search space"),
    "nothing": (b"", "no pickle of a search space"),
    "too much": (b"\x80\x03" + b"]" * 2**24 + b".", "bytes"),
}


@pytest.mark.parametrize(("content", "says"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_and_damaged_pickles_are_refused(tmp_path: Path, content: bytes, says: str):
    (tmp_path / "space.pickle").write_bytes(content)
    with pytest.raises(InputError, match=says):
        space_from_pickle(tmp_path / "space.pickle", deit_cost(384, depth=2))


def test_a_pickle_cut_anywhere_is_refused(pickled: Path, tmp_path: Path):
    content = pickled.read_bytes()
    for kept in range(0, len(content), 7):
        (tmp_path / "cut.pickle").write_bytes(content[:kept])
        with pytest.raises(InputError, match=r"cut\.pickle"):
            space_from_pickle(tmp_path / "cut.pickle", deit_cost(384, depth=2))


def test_a_pickle_with_any_byte_changed_gives_a_space_or_is_refused(pickled: Path, tmp_path: Path):
    content, rng = pickled.read_bytes(), np.random.default_rng(0)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] = rng.integers(256)
        (tmp_path / "changed.pickle").write_bytes(changed)
        try:
            space_from_pickle(tmp_path / "changed.pickle", deit_cost(384, depth=2))
        except InputError:
            continue


def test_the_leaves_are_those_of_a_released_layer():
    leaves = {name.split(f"{LAYER}.")[1] for name in supernet_state(tiny_model("deit")) if name.startswith(LAYER)}
    assert leaves | {"fc.weight", "fc.bias"} == set(LEAVES)
