"""The compiled library: what it says of itself, and what happens when it is missing or was built from other sources."""

import pytest
import torch

from euryale.kernels import backend, cpu, graph
from euryale.kernels.cpu import native
from euryale.kernels.linear import FrozenLinear
from euryale.kernels.silu_mul import silu_mul
from euryale.parallel import shared_memory

LIST = native.Path(native.__file__).with_name("operations.def")


def test_without_a_compiler_the_reference_runs_and_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "__init__.py"))
    assert cpu.load.__wrapped__() is None
    assert "install a C++ compiler" in caplog.text
    (tmp_path / "_native.so").write_bytes(b"not a library")
    assert cpu.load.__wrapped__() is None
    assert "must be built again" in caplog.text
    monkeypatch.setattr(cpu, "load", lambda: None)
    assert backend._best.__wrapped__("cpu") == "reference"
    assert cpu.instruction_set() == "reference"
    with pytest.raises(RuntimeError, match="pip install -e"):
        cpu.library.__wrapped__()


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        ("int64_t width, const void* gate_up, void* out", "const void* gate_up, void* out", "void silu_mul(int64_t"),
        ("float scale;", "double scale;", "double scale;"),
        ("EURYALE_PLAIN(false, const char*, instruction_set, ())\n", "", "const char* instruction_set()"),
    ],
)
def test_a_library_built_from_another_list_is_refused(monkeypatch, tmp_path, caplog, before, after, difference):
    """As if the list had changed since the build: a parameter, a field, a whole function."""
    text = LIST.read_text()
    assert text.count(before) == 1
    (tmp_path / LIST.name).write_text(text.replace(before, after))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert cpu.load.__wrapped__() is None
    assert "must be built again" in caplog.text
    assert difference in caplog.text


def test_a_reworded_list_and_an_installation_without_one_are_accepted(tmp_path):
    library = cpu.library()
    (tmp_path / "reworded.def").write_text("// Other words.\n" + LIST.read_text().replace(",\n", ", // why\n"))
    for name in ("reworded.def", "none.def"):
        library.add("euryale_operations", tmp_path / name)  # raises OSError for another list
        assert library.instruction_set().decode() == cpu.instruction_set()


def test_a_library_without_a_table_is_refused(tmp_path):
    with pytest.raises(OSError, match="the library has no euryale_nothing"):
        cpu.library().add("euryale_nothing", tmp_path / "none.def")


def test_types_come_from_the_declarations():
    addresses, counts = native.c_void_p, native.c_int64
    expected = [*[counts] * 3, *[addresses] * 3, native.c_float, *[addresses] * 2]
    assert list(cpu.library().add_rms_norm.argtypes) == expected
    assert cpu.library().add_rms_norm.restype is None
    collectives = shared_memory.library()
    assert list(collectives.shared_attach.argtypes) == [native.c_int, addresses, *[counts] * 5]
    assert collectives.shared_attach.restype is addresses
    assert collectives.instruction_set.restype is native.c_char_p
    with pytest.raises(AttributeError, match="no function silu_mulx"):
        collectives.silu_mulx  # noqa: B018


def test_a_structure_needs_a_value_for_every_field():
    values = {"is_bfloat16": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "q_stride": 64, "window": 3, "scale": 0.5}
    made = cpu.library().structure("Attention", values).contents
    assert {name: getattr(made, name) for name, _ in made._fields_} == values
    del values["window"]
    with pytest.raises(KeyError, match="window"):
        cpu.library().structure("Attention", values)


def test_a_recording_repeats_its_calls_and_refuses_set_up():
    torch.manual_seed(0)
    gate_up = torch.randn(3, 8)

    def twice() -> tuple[torch.Tensor, ...]:
        first = silu_mul(gate_up)
        return first, silu_mul(first)

    recording = graph.Recording(twice)
    gate_up.mul_(2)
    expected = twice()
    assert recording.replay() == 0
    assert all(map(torch.equal, recording.out, expected))
    assert list(recording.time()) == ["silu_mul"]
    with pytest.raises(RuntimeError, match="linear_size cannot be part of a recorded step"):
        graph.Recording(lambda: (FrozenLinear(gate_up)(gate_up),))
    assert torch.equal(silu_mul(gate_up), expected[0])  # and nothing is recorded any more
