"""The one call for all layers refuses arguments that do not fit, before it writes anything."""

from __future__ import annotations

import pytest
import torch
from runners import runner_of

from genarm_fast.kernels import _native
from genarm_fast.models.known_decoders import Norm
from genarm_fast.models.one_call import OneCall

pytestmark = pytest.mark.skipif(_native.core is None, reason="needs the C++ core")
CAPACITY = 24
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
ORDER = ("hidden", "x", "cos", "sin", "slots", "positions", "spans", "caches")


def arguments_of(decoder):
    """Return the fused forward of a Llama, and the arguments of a call of two rows to the core."""
    dtype = decoder.norm.weight.dtype
    hidden = torch.randn(2, 1, 32).to(dtype)
    cos, sin = torch.randn(2, 2, 1, 8).to(dtype)
    states = [torch.zeros(3, 2, CAPACITY, 8, dtype=dtype) for _ in range(4)]
    given = (hidden, hidden.clone(), cos, sin, torch.tensor([2, 0]), torch.tensor([[3], [4]]), ((),), tuple(states))
    return decoder.forward.one_call._core, dict(zip(ORDER, given, strict=True))


def other(tensor):
    """Return the same numbers in the other dtype that the core takes."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor.bfloat16()


@dtypes
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden", other),
        ("hidden", lambda hidden: hidden[..., :31]),
        ("hidden", lambda hidden: hidden.transpose(0, 2)),
        ("hidden", lambda hidden: hidden[0]),
        ("x", lambda x: x[:1]),
        ("x", lambda x: None),
        ("x", other),
        ("cos", other),
        ("sin", other),
        ("sin", lambda sin: sin[..., :4]),
        ("slots", lambda slots: slots.int()),
        ("slots", lambda slots: slots[:1]),
        ("positions", lambda positions: positions.expand(2, 2)),
        ("spans", lambda spans: ()),
        ("spans", lambda spans: [()]),
        ("spans", lambda spans: (((0, 1, 0),),)),  # no linear has a LoRA
        ("caches", lambda caches: caches[:3]),
        ("caches", lambda caches: list(caches)),
        ("caches", lambda caches: (other(caches[0]), *caches[1:])),
        ("caches", lambda caches: (*caches[:3], other(caches[3]))),
        ("caches", lambda caches: (caches[0][:, :1], caches[1][:, :1], *caches[2:])),
        ("caches", lambda caches: (*caches[:3], caches[3][..., :4])),
        ("caches", lambda caches: (*caches[:2], caches[2][:2], caches[3])),
    ],
)
def test_what_does_not_fit_is_not_begun(name, change, dtype):
    core, given = arguments_of(runner_of("llama", dtype).base_model)
    states = given["caches"]
    changed = given | {name: change(given[name])}
    assert core.run(*changed.values()) is None
    assert not any(cache.any() for cache in states)
    assert core.run(*given.values()) is not None
    assert all(cache.any() for cache in states)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("slots", torch.tensor([2, 3]), r"slots\[1\] = 3: expected 0..2"),
        ("positions", torch.tensor([[3], [24]]), r"positions\[1, 0\] = 24: expected 0..23"),
        ("spans", (((0, 3, 0),),), r"span \(0, 3, 0\): expected rows within 0..2"),
        ("spans", (((0, 1, -1),),), r"span \(0, 1, -1\)"),
    ],
)
def test_places_that_do_not_exist(name, value, error):
    core, given = arguments_of(runner_of("llama").base_model)
    with pytest.raises(ValueError, match=error):
        core.run(*(given | {name: value}).values())
    assert not any(cache.any() for cache in given["caches"])


def test_another_number_of_arguments():
    core, given = arguments_of(runner_of("llama").base_model)
    with pytest.raises(TypeError, match="7 arguments: expected 8"):
        core.run(*list(given.values())[:-1])


@pytest.mark.parametrize("layers", [(), ((),), (tuple(range(19)),), ("no layer",)])
def test_what_are_no_layers(layers):
    with pytest.raises(TypeError):
        _native.core.decoder_layers(layers)


def test_layers_that_do_not_fit_together():
    one, wider = runner_of("llama").base_model.forward, runner_of("llama", hidden_size=64).base_model.forward
    finer = runner_of("llama", torch.float32).base_model.forward
    for layer in (*wider.layers, *finer.layers):
        layer.second_norm = one.layers[0].second_norm
    for second in (wider.layers[0], finer.layers[0]):
        assert OneCall([one.layers[0], second], one.next_norms, [()])._core is None
    layer = finer.layers[1]
    for name in ("qkv", "o", "gate_up", "down"):
        assert OneCall([layer], one.next_norms, [()])._core is not None
        own, change = getattr(layer, name), getattr(one.layers[1], name)
        setattr(layer, name, change)
        assert OneCall([layer], one.next_norms, [()])._core is None
        setattr(layer, name, own)
    layer = one.layers[1]
    layer.down, layer.o = layer.o, layer.down
    assert OneCall(one.layers, one.next_norms, [()])._core is None


@dtypes
@pytest.mark.parametrize("weight", [None, torch.ones(32), torch.ones(31).to(torch.bfloat16)])
@pytest.mark.parametrize("which", ["second", "next"])
def test_norms_that_do_not_fit(which, weight, dtype):
    decoder = runner_of("llama", dtype).base_model
    if weight is not None and weight.dtype == dtype:
        weight = other(weight)
    _, given = arguments_of(decoder)
    forward, norm = decoder.forward, Norm(weight, 1e-6)
    if which == "second":
        forward.layers[1].second_norm = norm
    else:
        forward.next_norms[1] = norm
    assert OneCall(forward.layers, forward.next_norms, [()])._core.run(*given.values()) is None
    assert not any(cache.any() for cache in given["caches"])


def test_no_rows():
    core, given = arguments_of(runner_of("llama").base_model)
    none = {name: given[name][:0] for name in ("hidden", "x", "cos", "sin", "slots", "positions")}
    assert core.run(*(given | none).values()).shape == (0, 1, 32)
