"""The converter: checkpoints of the official code become ours and come back bit by bit, and bad input is refused.

The checkpoints are the official models' parameters, saved by Orbax as Google does and by torch.save. Each array is
drawn at random for itself: no two of the same shape could be exchanged unseen.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from recurrent_gemma_hf import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from recurrent_gemma_hf.conversion import checks, convert, mapping, sources, targets, upload, verification
from recurrent_gemma_hf.conversion.checks import Claims, ConversionError
from recurrent_gemma_hf.conversion.convert import Options, hf_to_official, official_to_hf
from tests import oracles  # skips this file where the official code is not installed
from tests.helpers import VARIANTS, build, tiny_config
from tests.test_conversion_tokenizer import train
from tests.test_upload import REPO, TOKEN, running_hub

ocp = pytest.importorskip("orbax.checkpoint", reason="install this package with its `test` extra")
tensorstore = pytest.importorskip("tensorstore", reason="install this package with its `test` extra")

SCRIPTS = Path(__file__).parents[1] / "conversion"
jax = oracles.jax

SHAPES = ("recurrentgemma", "wide_lru", "hawk", "attention_first")
DTYPES = ("float32", "bfloat16")
BITS = {4: np.uint32, 2: np.uint16}


def claims_of(config: RecurrentGemmaConfig) -> Claims:
    return Claims(
        attention_window_size=config.attention_window_size,
        logits_soft_cap=config.logits_soft_cap,
        embeddings_scale_by_sqrt_dim=config.embeddings_scale_by_sqrt_dim,
    )


def options_of(config: RecurrentGemmaConfig, **options) -> Options:
    return Options(claims=claims_of(config), **options)


def official_state(config: RecurrentGemmaConfig, dtype: str) -> dict[str, Tensor]:
    """The state dict of the official PyTorch model in `dtype`, its numbers drawn anew."""
    model = oracles.official_torch_code.Griffin(
        oracles.official_config(config), gradient_checkpointing=False, dtype=getattr(torch, dtype)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 4)
    return model.state_dict()


def flax_tree(config: RecurrentGemmaConfig, dtype: str, seed: int = 0) -> dict:
    """Parameters of the official JAX model in `dtype`: its own tree and shapes, numbers drawn anew."""
    model = oracles.official_jax_code.Griffin(
        oracles.official_config(config), dtype=jax.numpy.dtype(dtype), gradient_checkpointing=False
    )
    tokens = jax.ShapeDtypeStruct((1, 4), "int32")
    shapes = jax.eval_shape(lambda t: model.init(jax.random.key(0), t, t), tokens)["params"]
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(draw.standard_normal(leaf.shape, np.float32) / 4, dtype=dtype), shapes
    )


def save_orbax(path: Path, tree: dict, **layout) -> Path:
    ocp.PyTreeCheckpointer(**layout).save(path, tree)
    return path


def save_official(dialect: str, folder: Path, config: RecurrentGemmaConfig, dtype: str) -> Path:
    if dialect == "jax":
        return save_orbax(folder / "2b", {"params": flax_tree(config, dtype)})
    torch.save(official_state(config, dtype), folder / "2b.pt")
    return folder / "2b.pt"


def restore_orbax(path: Path) -> dict:
    """What Orbax itself reads, asked for NumPy arrays: it would warn that it cannot know the devices otherwise."""
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(path).item_metadata.tree
    return checkpointer.restore(
        path, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    )


def assert_same_bits(found: dict, expected: dict) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, expected_leaf), found_leaf in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        one, two = np.asarray(expected_leaf), np.asarray(found_leaf)
        assert one.dtype == two.dtype, path
        bits = BITS[one.dtype.itemsize]
        np.testing.assert_array_equal(two.view(bits), one.view(bits), err_msg=str(path))


@pytest.fixture
def config() -> RecurrentGemmaConfig:
    return tiny_config("wide_lru")


@pytest.fixture
def orbax(tmp_path, config) -> Path:
    return save_official("jax", tmp_path, config, "float32")


@pytest.fixture
def pt(tmp_path, config) -> Path:
    return save_official("torch", tmp_path, config, "float32")


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_orbax_comes_back_bit_by_bit(tmp_path, shape, dtype):
    config = tiny_config(shape)
    tree = flax_tree(config, dtype)
    save_orbax(tmp_path / "2b", {"params": tree})
    official_to_hf("jax", tmp_path / "2b", tmp_path / "hf", options_of(config))
    hf_to_official("jax", tmp_path / "hf", tmp_path / "back", Options())
    assert_same_bits(ocp.PyTreeCheckpointer().restore(tmp_path / "back")["params"], tree)
    assert left_in(tmp_path) == {"2b", "hf", "back"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pt_comes_back_bit_by_bit(tmp_path, shape, dtype):
    config = tiny_config(shape)
    pt = save_official("torch", tmp_path, config, dtype)
    state = torch.load(pt)
    official_to_hf("torch", pt, tmp_path / "hf", options_of(config))
    hf_to_official("torch", tmp_path / "hf", tmp_path / "back.pt", Options())
    for mmap in (False, True):
        back = torch.load(tmp_path / "back.pt", weights_only=True, mmap=mmap)
        assert back.keys() == state.keys()
        for name, tensor in state.items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor), name
    assert left_in(tmp_path) == {"2b.pt", "hf", "back.pt"}


def test_a_written_pt_is_a_sound_archive_that_can_be_mapped(tmp_path, config, pt, monkeypatch):
    """Every checksum is right, and tensors start where torch.save puts them; large ones too, which zip writes
    differently.
    """
    monkeypatch.setattr(targets.TorchFile, "_ZIP64_FROM", 10_000)
    official_to_hf("torch", pt, tmp_path / "hf", options_of(config))
    hf_to_official("torch", tmp_path / "hf", tmp_path / "back.pt", Options())
    with targets.zipfile.ZipFile(tmp_path / "back.pt") as archive:
        assert archive.testzip() is None
    state = torch.load(tmp_path / "back.pt", weights_only=True, mmap=True)
    assert {tensor.data_ptr() % 64 for tensor in state.values()} == {0}
    model = oracles.official_torch_code.Griffin(oracles.official_config(config), gradient_checkpointing=False)
    model.load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    "layout", [{"use_ocdbt": False}, {"use_ocdbt": True}, {"use_zarr3": True}, "standard"], ids=str
)
@pytest.mark.parametrize("outer", [True, False], ids=["params", "bare"])
def test_every_orbax_layout_gives_the_same_folder(tmp_path, config, orbax, layout, outer):
    tree = flax_tree(config, "float32")
    tree = {"params": tree} if outer else tree
    if layout == "standard":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "other", tree)
    else:
        save_orbax(tmp_path / "other", tree, **layout)
    official_to_hf("jax", orbax, tmp_path / "one", options_of(config))
    official_to_hf("jax", tmp_path / "other", tmp_path / "two", options_of(config))
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


_SAVE_SHARDED = """
import jax, numpy as np, orbax.checkpoint, sys
from jax.sharding import Mesh, NamedSharding, PartitionSpec
source, target = sys.argv[1:]
checkpointer = orbax.checkpoint.PyTreeCheckpointer()
tree = checkpointer.metadata(source).item_metadata.tree
arguments = jax.tree.map(lambda _: orbax.checkpoint.RestoreArgs(restore_type=np.ndarray), tree)
tree = checkpointer.restore(source, restore_args=arguments)
mesh = Mesh(np.array(jax.devices()), ("x",))
def split(leaf):
    axis = next((i for i, size in enumerate(leaf.shape) if size % 4 == 0), None)
    spec = PartitionSpec(*("x" if i == axis else None for i in range(leaf.ndim)))
    return jax.device_put(leaf, NamedSharding(mesh, spec))
orbax.checkpoint.PyTreeCheckpointer(use_ocdbt=False).save(target, jax.tree.map(split, tree))
"""


def test_arrays_that_were_sharded_over_devices(tmp_path, config, orbax):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", _SAVE_SHARDED, orbax, tmp_path / "sharded"], check=True, env={**os.environ, **flags}
    )
    pieces = tmp_path / "sharded" / "params.embedder.input_embedding"
    assert len(left_in(pieces) - {".zarray"}) == 4
    official_to_hf("jax", orbax, tmp_path / "one", options_of(config))
    official_to_hf("jax", tmp_path / "sharded", tmp_path / "two", options_of(config))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_pieces_of_zeros_that_old_orbax_left_out_are_zeros(tmp_path, config):
    tree = flax_tree(config, "float32")
    tree["final_norm"]["scale"] = jax.numpy.zeros_like(tree["final_norm"]["scale"])
    path = save_orbax(tmp_path / "2b", {"params": tree}, use_ocdbt=False)
    (path / "params.final_norm.scale/0").unlink()
    metadata = json.loads((path / "_METADATA").read_text())
    del metadata["store_array_data_equal_to_fill_value"]
    (path / "_METADATA").write_text(json.dumps(metadata))
    official_to_hf("jax", path, tmp_path / "hf", options_of(config))
    assert not load_file(tmp_path / "hf/model.safetensors")["model.final_norm.weight"].any()


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["jax", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_converted_model_is_the_official_model(tmp_path, shape, dialect):
    """--verify passes, and the folder loads with the official logits, by the tests' own oracle."""
    config = tiny_config(shape)
    path = save_official(dialect, tmp_path, config, "float32")
    official_to_hf(dialect, path, tmp_path / "hf", options_of(config, verify=True))
    model = RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.config.block_types == list(config.block_types)
    assert model.config.fingerprint() == config.fingerprint()
    tokens_BT = torch.randint(config.vocab_size, (2, 2 * config.attention_window_size))
    with torch.no_grad():
        logits_BTV = model(tokens_BT).logits
    official = oracles.official_torch(config, model.state_dict())
    torch.testing.assert_close(logits_BTV, oracles.official_torch_logits(official, tokens_BT), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dialect", ["jax", "torch"])
def test_verify_on_the_way_back_and_with_rounding(tmp_path, config, orbax, dialect):
    official_to_hf("jax", orbax, tmp_path / "hf", options_of(config, dtype=torch.bfloat16, verify=True))
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    hf_to_official(dialect, tmp_path / "hf", tmp_path / "back", Options(dtype=torch.float32, verify=True))
    assert set(sources.OrbaxSource(tmp_path / "back").dtypes.values() if dialect == "jax" else []) <= {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dialect", ["jax", "torch"])
def test_large_arrays_are_converted_in_pieces(tmp_path, config, monkeypatch, dialect, dtype):
    """No piece of the embedding is larger than it may be, and the files are the same, there and back."""
    path = save_official(dialect, tmp_path, config, dtype)
    official_to_hf(dialect, path, tmp_path / "whole", options_of(config))
    monkeypatch.setattr(targets, "PIECE_BYTES", 2000)
    written: dict[str, list[int]] = {}
    for kind in (targets.SafetensorsFolder, {"jax": targets.OrbaxFolder, "torch": targets.TorchFile}[dialect]):

        def write(self, name, piece, write=kind.write):
            written.setdefault(name, []).append(piece.nbytes)
            write(self, name, piece)

        monkeypatch.setattr(kind, "write", write)
    official_to_hf(dialect, path, tmp_path / "pieces", options_of(config, verify=dialect == "torch"))
    hf_to_official(dialect, tmp_path / "pieces", tmp_path / "back", Options(verify=dialect == "torch"))
    # a row takes 192 bytes in float32, so a piece has 10 of the 101, and in bfloat16 20
    full, last = (10 * 192, 192) if dtype == "float32" else (20 * 96, 96)
    expected = [full] * ((101 - 1) * config.hidden_size * (4 if dtype == "float32" else 2) // full) + [last]
    assert written["model.embed_tokens.weight"] == written["embedder.input_embedding"] == expected
    whole, in_pieces = (tmp_path / folder / "model.safetensors" for folder in ("whole", "pieces"))
    assert whole.read_bytes() == in_pieces.read_bytes()
    if dialect == "jax":
        assert_same_bits(restore_orbax(tmp_path / "back"), restore_orbax(path))
    else:
        state, back = (torch.load(file, weights_only=True) for file in (path, tmp_path / "back"))
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_pieces_that_end_elsewhere_than_the_stored_chunks(tmp_path, config, orbax, monkeypatch):
    official_to_hf("jax", orbax, tmp_path / "whole", options_of(config))
    monkeypatch.setattr(targets, "PIECE_BYTES", 2000)  # written in chunks of 10 rows
    hf_to_official("jax", tmp_path / "whole", tmp_path / "chunks", Options())
    monkeypatch.setattr(targets, "PIECE_BYTES", 7 * 192)
    official_to_hf("jax", tmp_path / "chunks", tmp_path / "pieces", options_of(config))
    whole, in_pieces = (tmp_path / folder / "model.safetensors" for folder in ("whole", "pieces"))
    assert whole.read_bytes() == in_pieces.read_bytes()


@pytest.mark.parametrize("ocdbt", [False, True], ids=["zarr", "ocdbt"])
def test_a_stored_chunk_is_decoded_once_for_all_of_its_pieces(tmp_path, config, ocdbt):
    """Orbax stores the embedding as one chunk: decoding it again for each piece would take forever at full size."""
    path = save_orbax(tmp_path / "2b", {"params": flax_tree(config, "float32")}, use_ocdbt=ocdbt)
    source = sources.OrbaxSource(path)

    def bytes_read() -> int:
        (metric,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return metric["values"][0]["value"]

    name = "embedder.input_embedding"
    parts = [source.read(name, slice(0, 10))]
    before = bytes_read()
    parts += [source.read(name, slice(start, min(start + 10, 101))) for start in range(10, 101, 10)]
    assert bytes_read() - before < 101 * 48
    whole = source.read(name)
    assert bytes_read() - before > 101 * 48 * 3, "otherwise this counts nothing"
    assert torch.equal(torch.cat(parts), whole)


def test_shards_and_their_index(tmp_path, config, orbax, monkeypatch):
    official_to_hf("jax", orbax, tmp_path / "one", options_of(config))
    monkeypatch.setattr(targets.SafetensorsFolder, "SHARD_BYTES", 100_000)
    official_to_hf("jax", orbax, tmp_path / "many", options_of(config, verify=True))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one/model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        for name, tensor in load_file(tmp_path / "many" / file).items():
            assert index["weight_map"][name] == file
            assert torch.equal(tensor, whole[name])
    loaded = RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())
    hf_to_official("jax", tmp_path / "many", tmp_path / "back", Options())
    assert_same_bits(restore_orbax(tmp_path / "back"), restore_orbax(orbax))


def test_a_saved_copy_of_the_tied_head_is_dropped(tmp_path, config):
    model = build(config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    model.config.save_pretrained(tmp_path / "hf")
    save_file(state, tmp_path / "hf/model.safetensors")
    hf_to_official("torch", tmp_path / "hf", tmp_path / "2b.pt", Options(verify=True))
    state["lm_head.weight"][0, 0] += 1
    save_file(state, tmp_path / "hf/model.safetensors")
    with pytest.raises(ConversionError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        hf_to_official("torch", tmp_path / "hf", tmp_path / "other.pt", Options())


def test_our_table_is_the_oracles(config):
    """The tests' own mapping was written independently and is checked against gradients."""
    for shape in VARIANTS:
        config = tiny_config(shape)
        independent = {entry.official: entry.ours for entry in oracles._entries(config)}
        assert {row.official: row.ours for row in mapping.table(config, "torch")} == independent


# --- the negative control ---------------------------------------------------------------------------------------------


def _swap(first: str, second: str):
    """A table in which two parameters of the same shape have changed places."""
    right = mapping.table

    def wrong(config, dialect):
        def other(name: str) -> str:
            return name.replace(first, "%").replace(second, first).replace("%", second)

        return [row._replace(ours=tuple(map(other, row.ours))) for row in right(config, dialect)]

    return wrong


@pytest.mark.parametrize("dialect", ["jax", "torch"])
@pytest.mark.parametrize(
    "swapped",
    [("recurrent_gate", "input_gate"), ("gate_proj", "up_proj"), ("linear_x", "linear_y"), ("k_proj", "v_proj"),
     ("temporal_pre_norm", "channel_pre_norm")],
    ids="-".join,
)  # fmt: skip
def test_a_wrong_mapping_is_caught_by_the_logits(tmp_path, config, orbax, pt, monkeypatch, swapped, dialect):
    """Its shapes fit, and back and forth through the same wrong table every bit survives: only the official code
    knows.
    """
    monkeypatch.setattr(mapping, "table", _swap(*swapped))
    source = {"jax": orbax, "torch": pt}[dialect]
    with pytest.raises(ConversionError, match="the logits differ from the official code's by"):
        official_to_hf(dialect, source, tmp_path / "hf", options_of(config, verify=True))
    assert left_in(tmp_path) == {"2b", "2b.pt"}


def test_a_changed_bit_is_caught(tmp_path, config, pt, monkeypatch):
    write = targets.SafetensorsFolder.write

    def damage(self, name, tensor):
        if name.endswith("2.mlp_block.down_proj.bias"):
            tensor = tensor.clone()
            tensor.view(torch.int32)[3] ^= 1
        write(self, name, tensor)

    monkeypatch.setattr(targets.SafetensorsFolder, "write", damage)
    with pytest.raises(ConversionError, match=r"differs from its source in blocks.2.mlp_block.ffw_down.bias"):
        official_to_hf("torch", pt, tmp_path / "hf", options_of(config, verify=True))
    assert left_in(tmp_path) == {"2b.pt"}


def test_every_deviation_from_the_bijection_is_named_in_one_message(tmp_path, config):
    state = official_state(config, "float32")
    del state["blocks.1.recurrent_block.linear_y.bias"]
    del state["final_norm.scale"]
    state["blocks.0.adapter.weight"] = torch.zeros(2)
    state["blocks.2.mlp_block.ffw_down.bias"] = torch.zeros(47)
    torch.save(state, tmp_path / "2b.pt")
    with pytest.raises(ConversionError) as error:
        official_to_hf("torch", tmp_path / "2b.pt", tmp_path / "hf", options_of(config))
    assert str(error.value).splitlines()[1:] == [
        "  missing: blocks.1.recurrent_block.linear_y.bias (80,)",
        "  missing: final_norm.scale (48,)",
        "  unexpected: blocks.0.adapter.weight (2,)",
        "  wrong shape: blocks.2.mlp_block.ffw_down.bias is (47,), expected (48,)",
    ]


def test_a_table_that_uses_an_array_twice_or_not_at_all_is_refused(tmp_path, config, pt, monkeypatch):
    right = mapping.table
    monkeypatch.setattr(mapping, "table", lambda *arguments: [*right(*arguments)[:-1], right(*arguments)[0]])
    with pytest.raises(ConversionError) as error:
        official_to_hf("torch", pt, tmp_path / "hf", options_of(config))
    assert str(error.value).splitlines()[1:] == [
        "  used 2 times by the mapping: model.embed_tokens.weight",
        "  used 2 times by the mapping: embedder.input_embedding",
        "  without a row in the mapping: model.final_norm.weight",
        "  unexpected: final_norm.scale (48,)",
    ]


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["jax", "torch"])
@pytest.mark.parametrize("preset", ["recurrentgemma-2b", "recurrentgemma-9b", "griffin-paper-7b", "hawk-paper-7b"])
def test_presets_agree_with_the_official_shapes(preset, dialect):
    """Shapes alone, no memory: what the official model of the preset would hold is inferred to be the preset."""
    config = RecurrentGemmaConfig.from_preset(preset)
    with torch.device("meta"):
        model = oracles.official_torch_code.Griffin(oracles.official_config(config), gradient_checkpointing=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if dialect == "jax":
        rename = {name: name.replace(".weight", ".kernel") for name in shapes}
        shapes = {rename[name]: shape[::-1] if rename[name] != name else shape for name, shape in shapes.items()}
    inferred = checks.infer_config(shapes, dialect, Claims(preset=preset))
    assert inferred.fingerprint() == config.fingerprint()
    assert inferred.block_types == list(config.block_types)
    rows, ours = mapping.table(inferred, dialect), checks.our_shapes(inferred)
    checks.check_bijection(rows, ours, checks.official_shapes(rows, ours), shapes)


def test_a_wrong_preset_is_refused_field_by_field(tmp_path, config, pt):
    with pytest.raises(ConversionError) as error:
        official_to_hf("torch", pt, tmp_path / "hf", Options(Claims(preset="recurrentgemma-2b")))
    lines = str(error.value).splitlines()
    assert "  hidden_size: the arrays say 48, preset recurrentgemma-2b says 2560" in lines
    assert "  lru_width: the arrays say 80, preset recurrentgemma-2b says 2560" in lines
    assert "  num_hidden_layers: the arrays say 3, preset recurrentgemma-2b says 26" in lines
    assert not any("vocab_size" in line or "layers_block_type" in line for line in lines), "the three layers agree"


def test_of_the_layers_the_first_that_differs_is_named(tmp_path):
    """Of attention and recurrent blocks in turn, four layers, two differ from the first of Hawk's 32 layers."""
    pt = save_official("torch", tmp_path, tiny_config("attention_first"), "float32")
    with pytest.raises(ConversionError) as error:
        official_to_hf("torch", pt, tmp_path / "hf", Options(Claims(preset="hawk-paper-7b")))
    assert [line.strip() for line in str(error.value).splitlines() if "block_type" in line] == [
        "layers_block_type[0], the first of 2: the arrays say 'attention', preset hawk-paper-7b says 'recurrent'"
    ]


def test_what_arrays_cannot_say_has_to_be_said(tmp_path, config, pt):
    with pytest.raises(ConversionError) as error:
        official_to_hf("torch", pt, tmp_path / "hf", Options(Claims(attention_window_size=8)))
    assert "--preset NAME, or --logits-soft-cap C (0: none) and --scale-embeddings or --no-scale" in str(error.value)
    assert "--attention-window-size" not in str(error.value)


def test_options_override_a_preset():
    claims = Claims(preset="recurrentgemma-2b", attention_window_size=512)
    assert claims.stated() == {
        "attention_window_size": 512,
        "logits_soft_cap": 30.0,
        "embeddings_scale_by_sqrt_dim": True,
    }


def test_claims_are_checked_against_config_json(tmp_path, config):
    build(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"logits_soft_cap: config.json says 3.0, the option says 30.0"):
        hf_to_official("torch", tmp_path / "hf", tmp_path / "2b.pt", Options(Claims(logits_soft_cap=30.0)))


def test_a_model_that_the_official_code_cannot_express_is_refused(tmp_path):
    config = tiny_config(num_key_value_heads=2, rope_theta=500.0)
    build(config).save_pretrained(tmp_path / "hf")
    message = r"no model with num_key_value_heads=2 \(official: 1\), rope_theta=500.0 \(official: 10000.0\)"
    with pytest.raises(ConversionError, match=message):
        hf_to_official("jax", tmp_path / "hf", tmp_path / "2b", Options())


# --- bad input --------------------------------------------------------------------------------------------------------


def assert_refused(dialect: str, source: Path, config: RecurrentGemmaConfig, message: str) -> None:
    before = left_in(source.parent)
    with pytest.raises(ConversionError, match=message):
        official_to_hf(dialect, source, source.parent / "hf", options_of(config))
    assert left_in(source.parent) == before


def halve(*files: Path) -> None:
    for file in files:
        os.truncate(file, file.stat().st_size // 2)


def rewrite(pt: Path, change: Callable[[dict], dict]) -> None:
    torch.save(change(torch.load(pt)), pt)


def another_model(orbax: Path) -> None:
    shutil.rmtree(orbax)
    save_orbax(orbax, {"params": {"transformer": {"layer_0": {"mlp": {"linear": {"w": jax.numpy.ones((4, 4))}}}}}})


def emptied(orbax: Path, *names: str) -> None:
    """Leave a folder that holds files of these names and nothing else."""
    shutil.rmtree(orbax)
    orbax.mkdir()
    for name in names:
        (orbax / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("dialect", "spoil", "message"),
    [
        ("jax", emptied, "2b is empty: give the folder that holds the Orbax checkpoint"),
        ("jax", shutil.rmtree, "2b is not a folder: an Orbax checkpoint is one"),
        (
            "jax",
            another_model,
            r"not a Griffin.*no embedder.input_embedding.*It holds transformer.layer_0.mlp.linear.w",
        ),
        ("jax", lambda path: emptied(path, "cat.jpg"), r"2b has no _METADATA .* It holds cat.jpg"),
        ("jax", lambda path: (path / "_METADATA").write_text("{"), "_METADATA is not JSON"),
        (
            "jax",
            lambda path: halve(*path.glob("ocdbt.process_0/d/*")),
            "cannot (read|open) .* copy or download the checkpoint again",
        ),
        ("torch", Path.unlink, "2b.pt does not exist"),
        ("torch", lambda path: (path.unlink(), path.mkdir()), "is a folder: give the .pt file in it"),
        ("torch", halve, "not a file of torch.save .*, or it is cut off"),
        ("torch", lambda path: rewrite(path, lambda _: {"step": 3}), r"no state dict .* save model.state_dict\(\)"),
        (
            "torch",
            lambda path: rewrite(path, lambda state: {name: tensor.half() for name, tensor in state.items()}),
            "is float16; only float32 and bfloat16 arrays",
        ),
        (
            "torch",
            lambda path: rewrite(path, lambda state: {n: t for n, t in state.items() if "blocks.1.recurrent" not in n}),
            "none, or both, in blocks.1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) > 5 else "",
)
def test_what_is_no_sound_checkpoint_is_refused(config, orbax, pt, dialect, spoil, message):
    source = {"jax": orbax, "torch": pt}[dialect]
    spoil(source)
    assert_refused(dialect, source, config, message)


def test_the_folder_around_the_checkpoint(tmp_path, config, orbax):
    assert_refused("jax", tmp_path, config, rf"has no _METADATA .*: give {orbax}, which has one")


@pytest.mark.parametrize(
    ("ocdbt", "spoil", "lost", "message"),
    [
        (True, Path.unlink, "_METADATA", "has no _METADATA"),
        (True, Path.unlink, "manifest.ocdbt", "has no manifest.ocdbt, which its _METADATA announces"),
        (
            False,
            Path.unlink,
            "params.final_norm.scale/.zarray",
            "lacks the array metadata .* of params.final_norm.scale",
        ),
        (False, Path.unlink, "params.final_norm.scale/0", "cannot read final_norm.scale"),
        (False, halve, "params.final_norm.scale/0", "cannot read final_norm.scale .* copy or download"),
    ],
)
def test_missing_metadata_or_data(tmp_path, config, ocdbt, spoil, lost, message):
    path = save_orbax(tmp_path / "2b", {"params": flax_tree(config, "float32")}, use_ocdbt=ocdbt)
    spoil(path / lost)
    assert_refused("jax", path, config, message)


def test_a_truncated_safetensors_file(tmp_path, config):
    build(config).save_pretrained(tmp_path / "hf")
    os.truncate(tmp_path / "hf/model.safetensors", 10_000)
    with pytest.raises(ConversionError, match=r"cannot open .*model.safetensors.* copy or download"):
        hf_to_official("torch", tmp_path / "hf", tmp_path / "2b.pt", Options())


class _Malicious:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_with_code_is_not_run(tmp_path, config):
    victim = tmp_path / "was_run"
    torch.save({"embedder.input_embedding": _Malicious(victim)}, tmp_path / "archive.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Malicious(victim)))
    assert_refused("torch", tmp_path / "archive.pt", config, "could run code when they are loaded: refused")
    assert_refused("torch", tmp_path / "plain.pt", config, "can hold code and are not opened")
    assert not victim.exists()


def test_a_folder_without_weights_or_config(tmp_path, config):
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConversionError, match=r"has no config.json"):
        hf_to_official("torch", tmp_path / "hf", tmp_path / "2b.pt", Options())
    config.save_pretrained(tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        hf_to_official("torch", tmp_path / "hf", tmp_path / "2b.pt", Options())
    (tmp_path / "hf/config.json").write_text('{"model_type": "gemma"}')
    (tmp_path / "hf/model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ConversionError, match=r"config.json is no RecurrentGemma config"):
        hf_to_official("torch", tmp_path / "hf", tmp_path / "2b.pt", Options())


@pytest.fixture
def no_writing(monkeypatch):
    """For what has to be noticed before the long work starts."""

    def write(self, name, piece):
        raise AssertionError("the work had started")

    for kind in (targets.SafetensorsFolder, targets.OrbaxFolder, targets.TorchFile):
        monkeypatch.setattr(kind, "write", write)


@pytest.mark.parametrize("lacking", ["recurrentgemma", "flax"])
def test_verify_without_the_official_code_or_what_it_needs(tmp_path, config, orbax, monkeypatch, no_writing, lacking):
    """`pip install recurrentgemma` alone brings no flax."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("recurrentgemma", "flax")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, lacking, None)  # importing it is an ImportError
    with pytest.raises(ConversionError, match=r"cannot be imported .*: pip install 'recurrentgemma\[full\]'"):
        official_to_hf("jax", orbax, tmp_path / "hf", options_of(config, verify=True))
    assert left_in(tmp_path) == {"2b"}


@pytest.mark.parametrize("back", [False, True], ids=["to hf", "to .pt"])
def test_verify_without_the_memory_for_it(tmp_path, config, pt, monkeypatch, no_writing, back):
    """The 2B model takes up to 16 GB: a message beforehand instead of a kill."""
    model = build(config)
    model.save_pretrained(tmp_path / "hf")
    needed = verification.BYTES_PER_PARAMETER["torch"] * sum(parameter.numel() for parameter in model.parameters())
    memory = psutil.virtual_memory()._replace(available=needed - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    direction, source = (hf_to_official, tmp_path / "hf") if back else (official_to_hf, pt)
    options = Options(verify=True) if back else options_of(config, verify=True)
    with pytest.raises(ConversionError, match=r"--verify runs .* of 0.00 billion .* GB are free: close other"):
        direction("torch", source, tmp_path / "out", options)
    assert left_in(tmp_path) == {"2b.pt", "hf"}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=needed))
    with pytest.raises(AssertionError, match="the work had started"):
        direction("torch", source, tmp_path / "out", options)


def test_verify_takes_the_numbers_as_they_are_stored(tmp_path, config):
    """A config.json that announces bfloat16 beside float32 weights rounds nothing."""
    build(config).save_pretrained(tmp_path / "hf")
    fields = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**fields, "dtype": "bfloat16"}))
    hf_to_official("torch", tmp_path / "hf", tmp_path / "back.pt", Options(verify=True))
    assert {tensor.dtype for tensor in torch.load(tmp_path / "back.pt").values()} == {torch.float32}


# --- the output -------------------------------------------------------------------------------------------------------


def test_an_output_that_is_there_is_left_alone(tmp_path, config, pt):
    (tmp_path / "hf").mkdir()
    official_to_hf("torch", pt, tmp_path / "hf", options_of(config))  # an empty folder is welcome
    before = (tmp_path / "hf/model.safetensors").read_bytes()
    with pytest.raises(ConversionError, match="hf is not empty: give a new folder, or empty it first"):
        official_to_hf("torch", pt, tmp_path / "hf", options_of(config))
    assert (tmp_path / "hf/model.safetensors").read_bytes() == before
    with pytest.raises(ConversionError, match=r"2b.pt exists: give a new name"):
        hf_to_official("torch", tmp_path / "hf", pt, Options())
    with pytest.raises(ConversionError, match="nowhere does not exist: create it first"):
        hf_to_official("torch", tmp_path / "hf", tmp_path / "nowhere/2b.pt", Options())


def test_no_space(tmp_path, config, pt, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert_refused("torch", pt, config, r"has 0.00 GB free, the result takes 0.00 GB: make room")


@pytest.mark.parametrize("target", ["hf", "jax", "torch"])
def test_an_interruption_leaves_nothing_and_a_rerun_starts_clean(tmp_path, config, pt, monkeypatch, target):
    """Ctrl-C in the middle of writing; then the leftovers of a run that was killed are swept away by the next."""
    official_to_hf("torch", pt, tmp_path / "first", options_of(config))

    def run():
        if target == "hf":
            official_to_hf("torch", pt, tmp_path / "out", options_of(config))
        else:
            hf_to_official(target, tmp_path / "first", tmp_path / "out", Options())

    kind = {"hf": targets.SafetensorsFolder, "jax": targets.OrbaxFolder, "torch": targets.TorchFile}[target]
    write, seen = kind.write, []

    def interrupted(self, name, tensor):
        seen.append(name)
        if len(seen) == 20:
            raise KeyboardInterrupt
        write(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert left_in(tmp_path) == {"2b.pt", "first"}
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/model.safetensors").write_bytes(b"half")
    run()
    assert left_in(tmp_path) == {"2b.pt", "first", "out"}


# --- the scripts ------------------------------------------------------------------------------------------------------


def run_script(name: str, *arguments, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_readme_on_an_archive_laid_out_like_kaggles(tmp_path):
    """`2b-it/` beside `tokenizer.model` becomes a folder that chats; what is wrong is a message, not a traceback."""
    config = tiny_config(vocab_size=900)
    archive = tmp_path / "2b-it"
    ocp.PyTreeCheckpointer().save(archive, flax_tree(config, "float32"))
    tokenizer_model = train(tmp_path / "tokenizer.model")
    command = ("orbax_to_hf", archive, tmp_path / "hf", "--attention-window-size", 12, "--logits-soft-cap", 3)
    command = (*command, "--scale-embeddings", "--tokenizer", tokenizer_model)
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'hf'}: 3 layers of width 48\n"
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert left_in(tmp_path / "hf") - {"chat_template.jinja"} == expected | {"README.md"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ha"}], tokenize=False, add_generation_prompt=True
    )
    assert turn == "<bos><start_of_turn>user\nha<end_of_turn>\n<start_of_turn>model\n"
    model = RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == [1, 107], "an -it model ends its turn"
    card = (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    assert "2b-it" in card
    assert "google/recurrentgemma-2b-it" not in card, "no preset was given: these need not be Google's weights"
    wrong = run_script(*command)
    assert wrong.returncode == 1
    # The last line: torchao, where it is installed, speaks of itself when Transformers imports it.
    *others, message = wrong.stderr.splitlines()
    assert message == f"error: {tmp_path / 'hf'} is not empty: give a new folder, or empty it first"
    assert not any("Traceback" in line for line in others)


def test_a_tokenizer_of_another_model_is_refused_before_the_weights_are_read(tmp_path, config, pt):
    tokenizer_model = train(tmp_path / "tokenizer.model")
    command = ("torch_to_hf", pt, tmp_path / "hf", "--attention-window-size", 12, "--logits-soft-cap", 3)
    done = run_script(*command, "--scale-embeddings", "--tokenizer", tokenizer_model)
    assert done.returncode == 1
    assert "900" in done.stderr
    assert "101" in done.stderr
    assert not (tmp_path / "hf").exists()


def test_pushed_to_the_hub_when_it_is_complete(tmp_path, config, pt):
    command = ("torch_to_hf", pt, tmp_path / "hf", "--attention-window-size", 12, "--logits-soft-cap", 3)
    with running_hub() as hub:
        done = run_script(
            *command, "--scale-embeddings", "--push-to-hub", REPO,
            HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files)
    assert "pushed: " in done.stdout


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [("somebody/my griffin", TOKEN, "is no name of a repository"), (REPO, "", "no token to push to")],
)
def test_what_cannot_be_pushed_is_noticed_before_the_work(
    tmp_path, config, pt, monkeypatch, no_writing, repo, token, message
):
    monkeypatch.setattr(upload, "get_token", lambda: token or None)
    with pytest.raises((ValueError, PermissionError), match=message):
        official_to_hf("torch", pt, tmp_path / "hf", options_of(config, push_to_hub=repo))
    assert left_in(tmp_path) == {"2b.pt"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "interrupted: nothing was left in {folder}"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
    ],
    ids=["ctrl-c", "disk full"],
)
def test_the_command_line_ends_with_a_message(tmp_path, config, pt, monkeypatch, error, message):
    def fail(self, name, tensor):
        raise error

    monkeypatch.setattr(targets.SafetensorsFolder, "write", fail)
    claims = "--attention-window-size 12 --logits-soft-cap 3 --no-scale-embeddings".split()
    with pytest.raises(SystemExit) as end:
        convert.main(official_to_hf, "torch", "", [str(pt), str(tmp_path / "hf"), *claims])
    assert end.value.code == message.format(folder=tmp_path)
    assert left_in(tmp_path) == {"2b.pt"}


@pytest.mark.parametrize("direction", [official_to_hf, hf_to_official])
def test_both_directions_have_the_one_interface(capsys, direction):
    options = "--preset --attention-window-size --logits-soft-cap --scale-embeddings --no-scale-embeddings --dtype"
    with pytest.raises(SystemExit, match=r"^0$"):
        convert.main(direction, "jax", "", ["--help"])
    usage = capsys.readouterr().out
    assert all(re.search(rf"{option}\b", usage) for option in f"{options} --verify".split())
    assert ("--tokenizer" in usage) == (direction is official_to_hf)


def test_the_scripts_go_back(tmp_path, config, orbax, pt):
    """The two that go there run in the tests around this one."""
    official_to_hf("jax", orbax, tmp_path / "hf", options_of(config))
    for script in ("hf_to_orbax", "hf_to_torch"):
        done = run_script(script, tmp_path / "hf", tmp_path / script)
        assert done.returncode == 0, done.stderr
    assert_same_bits(restore_orbax(tmp_path / "hf_to_orbax"), restore_orbax(orbax))
    assert torch.load(tmp_path / "hf_to_torch").keys() == torch.load(pt).keys()


def test_a_tokenizer_that_is_not_there_is_noticed_before_the_work(tmp_path, config, pt):
    options = options_of(config, tokenizer=tmp_path / "tokenizer.model")
    with pytest.raises(ConversionError, match=r"tokenizer.model: there is no such file"):
        official_to_hf("torch", pt, tmp_path / "hf", options)
