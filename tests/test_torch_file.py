"""Files of torch.save are read without torch, tensor by tensor, and nothing that they pickle is run."""

import collections
import pathlib
import pickle
import zipfile
from typing import Any

import numpy as np
import pytest
import torch

from specjax.models.weights import torch_file


def saved(path: pathlib.Path, value: Any) -> pathlib.Path:
    torch.save(value, path)
    return path


def with_pickle(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """An archive of torch.save's form with this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return path


DTYPES = (
    *("float64", "float32", "float16", "bfloat16"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)


def test_tensors_of_every_type_and_layout_are_read(tmp_path):
    tensors: dict[str, Any] = {name: torch.arange(12).reshape(3, 4).to(getattr(torch, name)) for name in DTYPES}
    base = torch.randn(6, 5)
    tensors |= {
        "transposed": base.T,
        "part": base[1:4, ::2],
        "shared": base,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    found = torch_file.read(saved(tmp_path / "x.bin", collections.OrderedDict(tensors)))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        wanted = tensor.detach().float().numpy() if name == "bfloat16" else tensor.detach().numpy()
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.asarray(found[name], wanted.dtype), wanted)
        assert found[name].size == 0 or not found[name].flags.writeable


def test_a_modules_parameters_and_nested_dictionaries_are_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2, bias=False))
    found = torch_file.read(saved(tmp_path / "x.pt", {"heads": module.state_dict()}))
    assert set(found) == {"heads.0.weight", "heads.0.bias", "heads.1.weight"}


class _Runs:
    """What runs a command when it is unpickled by Python's own unpickler."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    path = with_pickle(tmp_path / "x.bin", pickle.dumps({"weight": _Runs(pathlib.Path.touch, mark)}))
    with pytest.raises(ValueError, match=r"not read, because it asks for pathlib.* save its tensors as safetensors"):
        torch_file.read(path)
    assert not mark.exists()
    pickle.loads(zipfile.ZipFile(path).read("archive/data.pkl"))
    assert mark.exists(), "the planted pickle does not do anything"


@pytest.mark.parametrize(
    ("content", "words"),
    {
        "eval": (b"cbuiltins\neval\n(V1+1\ntR.", "asks for builtins.eval"),
        "os.system": (b"cos\nsystem\n(Vtrue\ntR.", "asks for os.system"),
        "attribute of an allowed module": (b"ctorch._utils\n_import_dotted_name\n.", "asks for torch._utils._import"),
        "dotted name": (
            b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
            "asks for collections.Ordered",
        ),
        "attributes of a function": (
            b"ctorch._utils\n_rebuild_tensor_v2\n(N}V__defaults__\nI1\nstb.",
            "it sets '__defaults__' of a function",
        ),
        "a called type": (b"ctorch\nFloatStorage\n(tR.", "calls a type of storages"),
        "no storage": (b"ctorch._utils\n_rebuild_tensor_v2\n(VX\nI0\n(tttR.", "broken|not read"),
        "another reference": (b"Pfile:///etc/passwd\n.", "refers to"),
        "a number": (b"I3\n.", "is a int, not a tensor"),
        "a list": (b"}VX\n]s.", "X is a list, not a tensor"),
        "cut off": (b"}VX\n", "not read"),
        "empty": (b"", "not read"),
        "an extension": (b"\x82\x01.", "not read"),
    }.values(),
)
def test_what_is_not_a_tensor_is_refused(content, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        torch_file.read(with_pickle(tmp_path / "x.bin", content))


def storage(name: str, dtype: bytes, count: int) -> bytes:
    return b"(Vstorage\nctorch\n" + dtype + b"\nV%b\nVcpu\nI%d\ntQ" % (name.encode(), count)


@pytest.mark.parametrize(
    ("count", "offset", "size", "words"),
    [
        (4, 0, 9, "outside its storage of 4"),
        (4, 3, 2, "outside"),
        (64, 0, 1, "has 16 bytes, not 256"),
        (4, -1, 2, "offset"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(count, offset, size, words, tmp_path):
    content = b"}VX\nctorch._utils\n_rebuild_tensor_v2\n(" + storage("0", b"FloatStorage", count)
    content += b"I%d\n(I%d\nt(I1\ntI00\nNtRs." % (offset, size)
    path = with_pickle(tmp_path / "x.bin", content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    with pytest.raises(ValueError, match=words):
        torch_file.read(path)


def test_files_that_are_broken_are_named(tmp_path):
    whole = saved(tmp_path / "x.bin", {"a": torch.randn(100)}).read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.bin").write_text("version https://git-lfs.github.com/spec/v1")
    for name in ("cut.bin", "text.bin"):
        with pytest.raises(ValueError, match=f"{name} is no zip archive"):
            torch_file.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.bin does not exist"):
        torch_file.read(tmp_path / "nowhere.bin")
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(ValueError, match=r"has 0 members data\.pkl"):
        torch_file.read(tmp_path / "other.bin")
    big = with_pickle(tmp_path / "big.bin", b"")
    with zipfile.ZipFile(big, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(torch_file.MAX_PICKLE + 1))
    with pytest.raises(ValueError, match="more than"):
        torch_file.read(big)
