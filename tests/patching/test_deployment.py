"""Compilers, exporters, quantisers, offloading and sharding: a patched model is deployed like any other."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from reference import LAYOUTS, build, run
from tiny import IMAGE, TORCH_2_9
from torch import Tensor, nn

from testreg import RegisterNeurons, disabled, is_patched, patch, unpatch
from testreg.families import find_tower
from testreg.neurons import describe_model


@functools.cache
def neurons(family: str) -> RegisterNeurons:
    """With the fingerprint of the weights, as calibration writes it, before they are quantised or sharded."""
    model = build(family)
    by_hand = RegisterNeurons.from_blocks({1: [3, 77, 120], 2: [0, 64, 127]})
    found = replace(by_hand, model=describe_model(model, find_tower(model)))
    assert found.model["fingerprint"] != "unknown"
    return found


def images(batch: int = 2, height: int = IMAGE, width: int = IMAGE) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def outputs(model: Any, inputs: Tensor | None = None) -> Tensor:
    return run(model, images() if inputs is None else inputs)


def patched(family: str) -> Any:
    """A patched tower whose registers make a difference; without the text tower, if the model has one."""
    model = build(family)
    tower = getattr(model, "visual", model)
    clean = outputs(tower)
    assert not torch.allclose(outputs(patch(tower, neurons(family))), clean, atol=1e-2)
    return tower


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


class MainOutput(nn.Module):
    """A tower that returns one tensor, whatever its library."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, inputs: Tensor) -> Tensor:
        return run(self.tower, inputs)


# Compilers and exporters ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_compile_takes_any_image_size_and_follows_patch_and_unpatch() -> None:
    torch._dynamo.reset()
    model = build("hf_dinov2_registers")
    # Not inductor, which takes a minute here.
    forward = torch.compile(MainOutput(model), fullgraph=True, dynamic=True, backend="aot_eager")
    shapes = (2, IMAGE, IMAGE), (3, IMAGE, 2 * IMAGE)
    clean = [outputs(model, images(*shape)) for shape in shapes]
    close(forward(images(*shapes[0])), clean[0])
    patch(model, neurons("hf_dinov2_registers"))
    for shape, plain in zip(shapes, clean, strict=True):
        expected = outputs(model, images(*shape))
        assert not torch.allclose(expected, plain, atol=1e-2)
        close(forward(images(*shape)), expected)
    unpatch(model)
    close(forward(images(*shapes[1])), clean[1])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "strict"), [("timm_dinov3", False), ("hf_clip", True), ("torchvision_vit", True)])
@torch.no_grad()
def test_an_exported_program_decomposes_and_survives_a_file(family: str, strict: bool) -> None:
    if TORCH_2_9 and family == "torchvision_vit":
        pytest.skip("torch 2.9 cannot export nn.MultiheadAttention without gradients, patched or not")
    model = patched(family)
    batch = {"inputs": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(MainOutput(model), (images(),), strict=strict, dynamic_shapes=batch)
    file = io.BytesIO()
    torch.export.save(program.run_decompositions(), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 5):
        close(loaded(images(size)), outputs(model, images(size)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["timm_vit", "hf_clip", "open_clip"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_onnx_takes_any_batch_size(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, path = patched(family), tmp_path / "model.onnx"
    batch = {"inputs": {0: torch.export.Dim("batch", min=1, max=64)}}
    torch.onnx.export(MainOutput(model).eval(), (images(),), path, dynamo=True, dynamic_shapes=batch, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (2, 5):
        (actual,) = session.run(None, {session.get_inputs()[0].name: images(size).numpy()})
        close(torch.from_numpy(actual), outputs(model, images(size)))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_torchscript_can_be_traced_but_not_scripted() -> None:
    model = build("timm_vit")
    patch(model, {1: [11, 13, 17]})  # used by no other test: the trace itself is the first to see these units
    traced = torch.jit.trace(model, images())
    close(traced(images(5)), outputs(model, images(5)))
    with pytest.raises(TypeError, match=r"torch.jit.script .*patched.*torch.jit.trace"):
        torch.jit.script(model)
    torch.jit.script(unpatch(model))


def replicate(model: Any) -> list[nn.Module]:
    """What torch.nn.parallel.replicate does to every module; the rest of it needs several GPUs."""
    return [module._replicate_for_data_parallel() for module in model.modules()]


def test_data_parallel_refuses_to_copy_a_patched_model() -> None:
    model = patched("timm_vit")
    with pytest.raises(TypeError, match=r"nn.DataParallel .*DistributedDataParallel"):
        replicate(nn.Sequential(model))
    replicate(unpatch(model))


# Precision and quantisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["timm_vit", "hf_clip", "hf_dinov3", "torchvision_vit"])
@torch.no_grad()
def test_float16_errs_far_less_than_registers_change(family: str) -> None:
    model = patched(family)
    expected = outputs(model)
    with disabled(model):
        change = (outputs(model) - expected).norm()
    actual = outputs(model.half(), images().half())
    assert actual.dtype == torch.float16
    assert (actual.float() - expected).norm() < 0.1 * change


def assert_errs_no_more(actual: Tensor, clean: Tensor, family: str) -> None:
    """The quantised outputs: the patched model's is as near to the exact one as the unpatched model's is."""
    error, plain_error = (actual - outputs(patched(family))).norm(), (clean - outputs(build(family))).norm()
    assert error < 1.5 * plain_error
    assert plain_error < 0.2 * clean.norm()


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("family", ["timm_vit", "hf_dinov2", "torchvision_vit"])
def test_quantised_weights_before_and_after_the_patch_are_the_same(family: str, config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def quantize(model: Any) -> Any:
        quantization.quantize_(model, getattr(quantization, config)())
        return model

    first = quantize(build(family))
    clean = outputs(first)
    actual = outputs(patch(first, neurons(family)))
    assert not actual.equal(clean)
    assert_errs_no_more(actual, clean, family)
    assert outputs(quantize(patched(family))).equal(actual)
    assert outputs(unpatch(first)).equal(clean)


@pytest.mark.parametrize("family", ["timm_vit", "hf_dinov2", "torchvision_vit"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_quantize_dynamic_goes_before_the_patch(family: str) -> None:
    def quantize(model: Any) -> Any:
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    quantized = quantize(build(family))
    clean = outputs(quantized)
    actual = outputs(patch(quantized, neurons(family)))
    assert not actual.equal(clean)
    assert_errs_no_more(actual, clean, family)
    assert outputs(unpatch(quantized)).equal(clean)

    replaced = quantize(patched(family))  # other modules now: the neurons would stay where they are
    with pytest.raises(RuntimeError, match=r"the second MLP linear of block 1 was replaced .*unpatch\(model\)"):
        outputs(replaced)
    with disabled(replaced):
        assert outputs(replaced).equal(clean)
    assert outputs(patch(unpatch(replaced), neurons(family))).equal(actual)


# accelerate ----------------------------------------------------------------------------------------------------------


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def half_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    from accelerate import dispatch_model

    ends = ("blocks.2", "blocks.3", "encoder.layers.2", "encoder.layers.3")
    on_disk = tuple(name for name, _ in model.named_modules() if name.endswith(ends))
    places = dict.fromkeys(on_disk, "disk")
    places |= {name: "cpu" for name, _ in model.named_parameters() if not name.startswith(on_disk)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def all_in_ram(model: nn.Module, folder: Path) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu")) or model


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")  # parameters are not modules
@pytest.mark.parametrize("place", [on_cpu, half_on_disk, all_in_ram])
@pytest.mark.parametrize("family", ["timm_vit", "hf_clip"])
def test_offloaded_models(family: str, place: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    clean, expected = outputs(build(family)), outputs(patched(family))

    before = place(build(family), tmp_path / "before")
    if place is not on_cpu:
        assert any(parameter.is_meta for parameter in before.parameters())
    assert outputs(patch(before, neurons(family))).equal(expected)
    assert outputs(unpatch(before)).equal(clean)

    after = place(patched(family), tmp_path / "after")
    assert outputs(after).equal(expected)
    with pytest.raises(RuntimeError, match=r"accelerate hooks, .*remove that first"):
        unpatch(after)
    hooks.remove_hook_from_module(after, recurse=True)
    assert not is_patched(unpatch(after))


# Several processes ---------------------------------------------------------------------------------------------------

SHARDED = ("timm_vit", "hf_clip")


def ddp(model: nn.Module, family: str) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)  # CLIP's pooler


def fsdp2(model: nn.Module, family: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    for block in LAYOUTS[family].blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_bf16(model: nn.Module, family: str) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh, policy = dist.init_device_mesh("cpu", (2,)), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in LAYOUTS[family].blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def fsdp2_checkpointed(model: Any, family: str) -> nn.Module:
    if family.startswith("hf"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # nothing else differs: no dropout
    else:
        model.set_grad_checkpointing(True)
    return fsdp2(model, family)


def fsdp1(model: nn.Module, family: str) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(LAYOUTS[family].blocks(model)[0])}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


WRAPPERS = {wrap.__name__: wrap for wrap in (ddp, fsdp2, fsdp2_bf16, fsdp2_checkpointed, fsdp1)}


def backward(model: nn.Module, inputs: Tensor) -> None:
    output = run(model, inputs)
    # Not a plain sum, which a final LayerNorm would make constant; a mean over images, as over processes.
    (output * torch.linspace(-1, 1, output[0].numel()).view_as(output[0])).sum().div(len(inputs)).backward()


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):  # does nothing without FSDP1
        return {
            name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): (
                gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
            )
            for name, parameter in model.named_parameters()
            if (gradient := parameter.grad) is not None
        }


def work(rank: int, folder: str) -> None:
    """Every case in one of two processes: what it gives, or the error."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results: dict[Any, Any] = {}
    for family in SHARDED:
        for kind, wrap in WRAPPERS.items():
            for order in ("patch first", "wrap first"):
                try:
                    if order == "patch first":
                        model = wrap(patch(build(family), neurons(family)), family)
                    else:
                        model = patch(wrap(build(family), family), neurons(family))
                    mine = images(4)[2 * rank : 2 * rank + 2]
                    forward = outputs(model, mine)
                    backward(model, mine)
                    results[family, kind, order] = forward, whole_gradients(model)
                except Exception as error:  # it is an assertion of the test that there is none
                    results[family, kind, order] = repr(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """The results of both processes."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("order", ["patch first", "wrap first"])
@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("family", SHARDED)
def test_two_processes_give_what_one_gives(family: str, kind: str, order: str, sharded: list[dict[Any, Any]]) -> None:
    single = patched(family)
    expected = outputs(single, images(4))
    backward(single, images(4))
    gradients = {name: parameter.grad for name, parameter in single.named_parameters() if parameter.grad is not None}
    largest = max(gradient.norm() for gradient in gradients.values())

    with disabled(single):
        change = (outputs(single, images(4)) - expected).norm() / expected.norm()

    for rank, results in enumerate(sharded):
        result = results[family, kind, order]
        assert not isinstance(result, str), result
        forward, actual = result
        mine = expected[2 * rank : 2 * rank + 2]
        assert actual.keys() >= gradients.keys()
        if kind == "fsdp2_bf16":
            assert (forward - mine).norm() < 0.5 * change * mine.norm()
            error = sum((actual[name] - gradient).square().sum() for name, gradient in gradients.items())
            assert error < 0.05**2 * sum(gradient.square().sum() for gradient in gradients.values())
            continue
        close(forward, mine)
        for name, gradient in gradients.items():
            # A key's bias has no gradient but rounding, hence the term of the largest one.
            assert (actual[name] - gradient).norm() < 1e-5 * (gradient.norm() + 0.01 * largest), name
