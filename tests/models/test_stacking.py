"""Models loaded as on a GPU, with PyTorch's references for kernels: weights are stacked, or a reason is given."""

import copy
import gc
import itertools

import pytest
import torch
from against_reference import assert_equals_reference
from peft import PeftModel
from tiny_models import build_model, save_adapter
from torch import nn
from transformers import AutoModelForCausalLM

import genarm_fast.functional
from genarm_fast import GenARM, SamplingParams
from genarm_fast.kernels import _native
from genarm_fast.models import fast_modules, stacking
from genarm_fast.models.stacked_decoder import StackedDecoder
from genarm_fast.models.stacking import tolerance
from genarm_fast.models.weights import Movable, share_weights

PROMPTS = [[5, 6, 7, 8], [9, 3]]
PARAMS = SamplingParams(max_new_tokens=5, seed=3, ignore_eos=True)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
STACKS = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(fast_modules, "on_gpu", lambda model: True)
    monkeypatch.setattr(_native, "core", None)  # the core has its own forward for the CPU


def decoder_of(model: GenARM, member: int = 0):
    """Return the forward of a member's decoder, and the text that says what runs it."""
    runner = model.engine().executor.runners[member]
    return vars(runner.model.base_model).get("forward"), runner.model.runs_by


def in_stacks(model: nn.Module) -> bool:
    """Whether the linears of one input are adjacent in one memory."""
    for layer in model.model.layers:
        for names in STACKS:
            parts = [getattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name) for name in names]
            for one, other in itertools.pairwise(parts):
                if one.weight.data_ptr() + one.weight.nbytes != other.weight.data_ptr():
                    return False
    return True


def assert_reference(model: GenARM, weights=()) -> None:
    params = PARAMS.override(weights=list(weights) or None, rewards=True, logprobs=0)
    for output in model.generate(PROMPTS, params):
        expected = {"weights": list(weights), "max_new_tokens": 5, "ignore_eos": True}
        assert_equals_reference(model, output, **expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_given_model_is_stacked_and_stays_what_it_is(family, tokenizer):
    base = build_model(family, 0)
    before, probe = copy.deepcopy(base.state_dict()), torch.arange(6)[None]
    logits = base(probe).logits
    model = GenARM.from_pretrained(base, build_model(family, 1), tokenizer=tokenizer)
    for member in (0, 1):
        assert isinstance(decoder_of(model, member)[0], StackedDecoder)
    assert all(how.startswith("stacked: ") for how in model.forwards.values())
    assert list(model.forwards) == ["base", *model.arm_names]
    assert_reference(model, [0.7])
    assert in_stacks(base)
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(base(probe).logits, logits)


def test_no_weight_is_held_twice(tokenizer):
    base = build_model("llama", 0)
    model = GenARM.from_pretrained(base, tokenizer=tokenizer)
    forward, _ = decoder_of(model)
    for layer, own in zip(forward.layers, base.model.layers):
        assert layer.qkv.weight.untyped_storage().data_ptr() == own.self_attn.q_proj.weight.untyped_storage().data_ptr()
        assert layer.gate_up.weight.shape[0] == 2 * own.mlp.up_proj.weight.shape[0]
    places = {p.untyped_storage().data_ptr() for tree in (base, model.base.runner) for p in tree.parameters()}
    stacks = 4 * len(base.model.layers)  # one place per stack, plus norms, embedding and head
    assert len(places) == stacks + sum(p.dim() == 1 for p in base.parameters()) + 2


def test_the_owner_may_change_and_train_it(tokenizer):
    base = build_model("llama", 0)
    model = GenARM.from_pretrained(base, tokenizer=tokenizer)
    before = model.generate(PROMPTS, PARAMS)[0].token_ids
    base(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter -= 50 * parameter.grad
    assert_reference(model)
    assert model.generate(PROMPTS, PARAMS)[0].token_ids != before
    base.model.layers[1].mlp.up_proj.weight.data = base.model.layers[1].mlp.up_proj.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"the weight model\.layers\.1\.mlp\.up_proj\.weight was moved in memory"):
        model.generate(PROMPTS, PARAMS)


def test_lanes(tmp_path, tokenizer):
    """All lanes are in one stacked decoder, and the adapters' own trees use its weights."""
    build_model("llama", 0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        save_adapter(tmp_path / f"arm{seed}", base=tmp_path / "base", seed=seed)
    model = GenARM.from_pretrained(
        tmp_path / "base", [tmp_path / "arm1", tmp_path / "arm2"], dtype=torch.float32, device="cpu"
    )
    forward, _ = decoder_of(model)
    assert isinstance(forward, StackedDecoder)
    assert len(model.engine().executor.runners) == 1
    assert_reference(model, [1.0, -0.5])
    places = {linear.weight.data_ptr() for m in model.members for linear in base_linears(m.model)}
    assert len(places) == 7 * 2


def base_linears(model):
    return [m for name, m in model.named_modules() if type(m) is nn.Linear and name.split(".")[-1] in PROJECTIONS]


PROJECTIONS = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")} | {"base_layer"}


@pytest.fixture
def with_lora(tmp_path):
    """A base and a PEFT model over its weights."""
    build_model("llama", 0).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "arm", base=tmp_path / "base", seed=1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    return base, PeftModel.from_pretrained(share_weights(base), tmp_path / "arm")


def test_given_adapters_are_read_anew(with_lora, tokenizer):
    base, arm = with_lora
    model = GenARM.from_pretrained(base, arm, tokenizer=tokenizer)
    forward, _ = decoder_of(model)
    assert isinstance(forward, StackedDecoder)
    assert forward.adapter_by_lane == {1: 0}
    before = model.generate(PROMPTS, PARAMS)[0].token_ids
    with torch.no_grad():
        for name, parameter in arm.named_parameters():
            if "lora_" in name:
                parameter.mul_(-3)
    assert_reference(model, [1.0])
    assert model.generate(PROMPTS, PARAMS)[0].token_ids != before


def test_lanes_that_are_not_stacked_read_the_weights_where_these_lie_now(with_lora, tokenizer, monkeypatch):
    base, arm = with_lora
    monkeypatch.setattr(stacking, "deviation", lambda *_: 1.0)
    model = GenARM.from_pretrained(base, arm, tokenizer=tokenizer)
    assert decoder_of(model)[0] is None
    with torch.no_grad():
        for linear in base_linears(base):
            linear.weight.mul_(-2)
    assert_reference(model, [1.0])


def test_weights_that_other_trees_share_move_there_as_well(tokenizer):
    """The ARM differs from its base in one weight and was not made by `share_weights`."""
    base = build_model("llama", 0)
    arm = copy.deepcopy(base, {id(p): p if p is not base.lm_head.weight else None for p in base.parameters()})
    arm.lm_head.weight = nn.Parameter(-base.lm_head.weight.detach())
    for name, p in arm.named_parameters():  # parameters of their own over the same memory
        arm.get_submodule(name.rpartition(".")[0])._parameters["weight"] = nn.Parameter(p.detach())
    model = GenARM.from_pretrained(base, arm, tokenizer=tokenizer)
    assert len(model.engine().executor.runners) == 2
    ends = [[each.self_attn.o_proj.weight.data_ptr() for each in tree.model.layers] for tree in (base, arm)]
    assert ends[0] == ends[1]
    assert_reference(model, [1.0])


def places_of(*trees):
    return {p.untyped_storage().data_ptr() for tree in trees for p in tree.parameters()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_second_model_shares_the_stacked_weights(family, tokenizer):
    """Nothing moves or is copied, and the shared weights live as long as one of the models does."""
    base = build_model(family, 0)
    first = GenARM.from_pretrained(base, tokenizer=tokenizer)
    before = places_of(base)
    second = GenARM.from_pretrained(base, build_model(family, 1), tokenizer=tokenizer)
    forward, how = decoder_of(second)
    assert isinstance(forward, StackedDecoder)
    assert "; its weights were stacked for another model, and are shared" in how
    assert "shared" not in decoder_of(first)[1]
    assert places_of(base, second.base.runner) == before
    assert forward.layers[0].qkv.weight.data_ptr() == base.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert_reference(first)
    assert_reference(second, [0.7])
    del first
    gc.collect()
    third = GenARM.from_pretrained(base, tokenizer=tokenizer)  # only the second model keeps the stacks alive
    assert "shared" in decoder_of(third)[1]
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(-2)
    assert_reference(second, [0.7])
    assert_reference(third)
    del second, third, forward
    gc.collect()
    fourth = GenARM.from_pretrained(base, tokenizer=tokenizer)
    assert "shared" not in decoder_of(fourth)[1]
    assert places_of(base).isdisjoint(before - places_of(fourth.base.runner))
    assert_reference(fourth)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_models_over_one_base_have_adapters_of_their_own(family, tmp_path, tokenizer):
    """The first model's adapters are rows of the shared weights; the second model's are stored apart."""
    build_model(family, 0).save_pretrained(tmp_path / "base")
    for seed in (1, 2, 3):
        save_adapter(tmp_path / f"arm{seed}", base=tmp_path / "base", seed=seed)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    arms = [PeftModel.from_pretrained(share_weights(base), tmp_path / f"arm{seed}") for seed in (1, 2, 3)]
    first = GenARM.from_pretrained(base, arms[0], tokenizer=tokenizer)
    second = GenARM.from_pretrained(base, arms[1:], tokenizer=tokenizer)
    for model, weights in ((first, [1.0]), (second, [1.0, -0.5]), (first, [0.3])):
        assert isinstance(decoder_of(model)[0], StackedDecoder)
        assert len(model.engine().executor.runners) == 1
        assert_reference(model, weights)
    products = decoder_of(second)[0].products
    assert any(product.rank for product in products)
    assert all(not product.owns_stack and len(product.weight) == sum(product.widths) for product in products)


def test_weights_that_are_stacked_otherwise_are_not_shared(tokenizer):
    base = build_model("llama", 0)
    first = GenARM.from_pretrained(base, tokenizer=tokenizer)
    layer = base.model.layers[0].mlp
    other = share_weights(base)
    own = other.model.layers[0].mlp
    own.gate_proj.weight, own.up_proj.weight = own.up_proj.weight, own.gate_proj.weight
    forward, how = stacking.stacked_forward(other.model, Movable([other]))
    assert (forward, how) == (None, "its own forward: its weights are stacked for another model in another way")
    assert own.up_proj.weight.data_ptr() == layer.gate_proj.weight.data_ptr()
    assert_reference(first)


def test_kept_models_are_stacked_once(tokenizer, monkeypatch):
    """`genarm_fast.generate` moves the weights of a given model, and does not take the move for a change."""
    made, load = [], GenARM.from_pretrained
    monkeypatch.setattr(
        GenARM, "from_pretrained", lambda *args, **kwargs: made.append(load(*args, **kwargs)) or made[-1]
    )
    base = build_model("llama", 0)
    texts = [genarm_fast.generate(base, (), PROMPTS, PARAMS, tokenizer=tokenizer)[0].token_ids for _ in range(2)]
    assert len(made) == 1
    assert in_stacks(base)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(-2)
    assert isinstance(decoder_of(made[0])[0], StackedDecoder)
    texts.append(genarm_fast.generate(base, (), PROMPTS, PARAMS, tokenizer=tokenizer)[0].token_ids)
    assert len(made) == 1
    assert texts[0] == texts[1] != texts[2]
    genarm_fast.release()


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def other_linear(model):
    class Mine(nn.Linear):
        pass

    own = model.model.layers[1].mlp.up_proj
    made = Mine(own.in_features, own.out_features, bias=False)
    made.weight = own.weight
    model.model.layers[1].mlp.up_proj = made


def two_dtypes(model):
    model.model.norm.double()


def shared_layers(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("gemma2", lambda model: None, "Gemma2Model with its hooks is none of Llama, Mistral, Qwen2, Qwen3"),
        ("llama", hooked, "LlamaModel with its hooks is none of"),
        ("llama", other_linear, "some of its linears are no plain ones"),
        ("llama", two_dtypes, "its weights are on 1 devices in 2 dtypes"),
        ("llama", shared_layers, "some of its layers share weights"),
    ],
)
def test_what_is_not_stacked(family, change, reason):
    base = build_model(family, 0)
    change(base)
    before = {name: p.data_ptr() for name, p in base.named_parameters()}
    forward, how = stacking.stacked_forward(base.model, Movable([base]))
    assert forward is None
    assert how.startswith(f"its own forward: {reason}")
    assert before == {name: p.data_ptr() for name, p in base.named_parameters()}


def test_another_activation_is_not_stacked():
    base = build_model("llama", 0, hidden_act="gelu")
    assert stacking.stacked_forward(base.model, Movable([base])) == (None, "its own forward: its activation isn't SiLU")


def test_a_decoder_that_is_off_keeps_its_own_forward(tokenizer, monkeypatch):
    """The gate is halved. A trial notices such an error."""
    from genarm_fast.models import stacked_decoder

    gated = stacked_decoder.gated_mul
    monkeypatch.setattr(stacked_decoder, "gated_mul", lambda *args, **kwargs: gated(*args, **kwargs) / 2)
    model = GenARM.from_pretrained(build_model("llama", 0), tokenizer=tokenizer)
    forward, how = decoder_of(model)
    assert forward is None
    assert "the stacked one is" in how
    assert_reference(model)


def test_a_decoder_that_fails_keeps_its_own_forward(tokenizer, monkeypatch):
    from genarm_fast.models import stacked_decoder

    def fails(*args, **kwargs):
        raise NotImplementedError("heads of 17")

    monkeypatch.setattr(stacked_decoder, "rotary_append", fails)
    model = GenARM.from_pretrained(build_model("llama", 0), tokenizer=tokenizer)
    how = "its own forward: the stacked one failed in its trial: NotImplementedError: heads of 17"
    assert decoder_of(model) == (None, how)
    assert_reference(model)


def test_running_out_of_memory_in_the_trial_is_told(monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stacking, "deviation", fails)
    base = build_model("llama", 0)
    with pytest.raises(torch.OutOfMemoryError):
        stacking.stacked_forward(base.model, Movable([base]))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.2), (torch.float16, 0.025), (torch.float32, 2e-4)])
def test_tolerance_of_32_layers(dtype, bound):
    base = build_model("llama", 0, num_hidden_layers=32, hidden_size=8, intermediate_size=8).to(dtype)
    assert tolerance(base.model) == pytest.approx(bound, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_within_the_tolerance(dtype):
    """References in low precision stay within the tolerance, for weights as large as trained ones."""
    base = build_model("llama", 0, num_hidden_layers=8, hidden_size=64, initializer_range=0.05).to(dtype)
    forward, how = stacking.stacked_forward(base.model, Movable([base]))
    assert forward is not None, how
