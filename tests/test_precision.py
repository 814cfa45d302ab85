"""--precision: bf16 where there are units for it, fp32 elsewhere, and no run that takes for ever."""
from types import SimpleNamespace

import pytest
import torch

from utils import precision
from utils.errors import UserError
from utils.options import FLAGS, Parser, resolve
from utils.precision import cpu_has_bf16, settle_precision, told

CPU, GPU = torch.device("cpu"), torch.device("cuda")
INTEL = "processor : 0\nmodel name : some\nflags\t\t: fpu avx2 avx512f {}\nbugs : none\n"


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """A function: the text of /proc/cpuinfo from now on."""
    def become(text, isa=None):
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        monkeypatch.setattr(precision, "Path", lambda _: path)
        # Not in this process's own environment: scripts that other tests start meanwhile would compute otherwise.
        environ = {} if isa is None else {"ONEDNN_MAX_CPU_ISA": isa}
        monkeypatch.setattr(precision, "os", SimpleNamespace(environ=environ))
        cpu_has_bf16.cache_clear()
        return cpu_has_bf16()
    yield become
    cpu_has_bf16.cache_clear()


@pytest.mark.parametrize("flags, found", [("", False), ("amx_tile amx_int8", False), ("avx512_bf16", True),
                                          ("amx_tile amx_bf16", True), ("avx512_bf16_like", False)])
def test_a_cpu_has_bf16_units_if_its_flags_say_so(processor, flags, found):
    assert processor(INTEL.format(flags)) is found, flags


def test_an_arm_cpu_lists_its_units_as_features(processor):
    assert processor("processor : 0\nFeatures : fp asimd bf16 i8mm\n") is True
    assert processor("processor : 0\nFeatures : fp asimd\n") is False


@pytest.mark.parametrize("isa, found", [("AVX2", False), ("AVX512_CORE", False), ("AVX512_CORE_BF16", True),
                                        ("avx512_core_amx", True), ("DEFAULT", True)])
def test_units_that_onednn_may_not_use_do_not_count(processor, isa, found):
    assert processor(INTEL.format("avx512_bf16 amx_bf16"), isa) is found, isa


def test_another_system_than_linux_has_none_that_are_known(processor, monkeypatch):
    monkeypatch.setattr(precision.platform, "system", lambda: "Darwin")
    assert processor(INTEL.format("amx_bf16")) is False


@pytest.mark.parametrize("units, asked, settled", [(True, "auto", "bf16"), (False, "auto", "fp32"),
                                                   (True, "fp32", "fp32"), (False, "fp32", "fp32"),
                                                   (True, "bf16", "bf16")])
def test_auto_takes_bf16_where_there_are_units_and_the_header_says_why(monkeypatch, units, asked, settled):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: units)
    assert settle_precision(asked, CPU) == settled
    words = "has bf16 units" if units else "has no bf16 units"
    assert words in told(settled, CPU) and told(settled, CPU).startswith(settled), told(settled, CPU)


def test_bf16_on_a_cpu_without_units_is_refused_with_the_figure(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    with pytest.raises(UserError, match=r"318 s instead of 30 s\); pass --precision fp32"):
        settle_precision("bf16", CPU)


@pytest.mark.parametrize("capability, settled", [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_has_bf16_units_since_ampere(monkeypatch, capability, settled):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert settle_precision("auto", GPU) == settled
    if settled == "fp32":
        with pytest.raises(UserError, match="cuda has no bf16 units; pass --precision fp32"):
            settle_precision("bf16", GPU)


@pytest.mark.parametrize("recorded, taken", [("bf16", "auto"), ("fp32", "fp32")])
def test_bf16_of_a_record_holds_where_this_machine_has_units_and_fp32_everywhere(recorded, taken, capsys):
    parser = Parser("", ("dataset", "precision"), "stage2")
    args = resolve(parser, parser.parse_args([]), {"precision": recorded}, "RECORD", ("precision",))
    assert args.precision == taken, args.precision
    assert f"precision={taken}" in capsys.readouterr().err


def test_the_flag_is_auto_by_default():
    assert FLAGS["precision"].default == "auto" and FLAGS["precision"].choices == ("auto", "fp32", "bf16")
