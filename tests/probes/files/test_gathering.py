import pytest

from probes import open_checkpoint

# Files of a directory, and what is said of them; {} is the directory.
FOREIGN = {
    "ZeRO": (["latest", "zero_to_fp32.py", "global_step9/zero_pp_rank_0_mp_rank_00_model_states.pt"],
             "ZeRO (global_step9, zero_to_fp32.py); gather them with `python {}/zero_to_fp32.py {} OUT`"),
    "FSDP": (["trainer_state.json", "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"],
             "merge them with `accelerate merge-weights {}/pytorch_model_fsdp_0 OUT`"),
    "FSDP, gathered": (["pytorch_model_fsdp.bin"], "rename it to pytorch_model.bin"),
    "DCP": ([".metadata", "__0_0.distcp"], "format_utils dcp_to_torch {} OUT.pt`"),
    "Megatron": (["latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"],
                 "Megatron or NeMo (iter_0000100, latest_checkpointed_iteration.txt); export it"),
    "transformers": (["shard-00000-model-00001-of-00002.safetensors",
                      "shard-00001-model-00001-of-00002.safetensors"],
                     "gather them with `AutoModelForCausalLM.from_pretrained('{}').save_pretrained('OUT')`"),
    "GGUF": (["tiny-q4.gguf", "config.json"], "from_pretrained('{}', gguf_file='tiny-q4.gguf')"),
    "TensorFlow": (["tf_model.h5"], "weights of TensorFlow or Flax (tf_model.h5); convert them where"),
    "Flax": (["flax_model.msgpack"], "weights of TensorFlow or Flax (flax_model.msgpack)"),
    "ONNX": (["model.onnx"], "give the checkpoint that it was exported from"),
    "adapters": (["chat/adapter_config.json", "sql/adapter_config.json"],
                 "holds adapters in directories of their own (chat, sql); name one, {}/chat"),
    "a run": (["checkpoint-5/config.json"], "holds models in directories of their own (checkpoint-5)"),
    "shards": (["model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors"],
               "2 of 4 shards are here (model-00001-of-00004.safetensors…) and no model.safetensors.index"),
    "old shards": (["pytorch_model-00001-of-00002.bin"],
                   "1 of 2 shards are here (pytorch_model-00001-of-00002.bin…) and no pytorch_model.bin."),
    "nothing yet": (["config.json", "trainer_state.json"], "trainer_state.json lies there: is it still"),
    "half an adapter": (["adapter_config.json", "global_step5/x"], "DeepSpeed's ZeRO (global_step5)"),
}  # fmt: skip


def written(directory, files):
    for file in files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text("{}")


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_lies_in_a_directory_without_readable_weights_is_named_with_its_remedy(kind, tmp_path):
    files, reason = FOREIGN[kind]
    written(tmp_path, files)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_checkpoint(tmp_path)
    assert reason.replace("{}", str(tmp_path)) in str(error.value)


@pytest.mark.parametrize(("kind", "part"), [("ZeRO", "global_step9"), ("FSDP", "pytorch_model_fsdp_0")])
def test_a_part_of_a_checkpoint_is_gathered_as_the_whole(kind, part, tmp_path):
    files, reason = FOREIGN[kind]
    written(tmp_path, files)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_checkpoint(tmp_path / part)
    assert reason.replace("{}", str(tmp_path)) in str(error.value)


def test_a_file_of_another_format_is_named_too(tmp_path):
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(ValueError, match=r"tiny.gguf: holds a model for llama.cpp \(tiny.gguf\); give the"):
        open_checkpoint(tmp_path / "tiny.gguf")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"weights are read from \.safetensors, \.bin, \.pt or \.pth files"):
        open_checkpoint(tmp_path / "notes.txt")


def test_weights_that_are_read_come_before_all_that_lies_beside_them(directory):
    written(directory, ["global_step9/x", "model.onnx", "sql/adapter_config.json", "model.gguf"])
    assert open_checkpoint(directory).kind == "full"


def test_a_link_out_of_the_directory_is_not_entered(tmp_path):
    (tmp_path / "outside" / "adapter").mkdir(parents=True)
    (tmp_path / "outside" / "adapter_config.json").write_text("{}")
    (tmp_path / "outside" / "__0_0.distcp").touch()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "pytorch_model_fsdp_0").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="no weights"):
        open_checkpoint(tmp_path / "inside")
