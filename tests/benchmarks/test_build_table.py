"""The table of builds: machine code is counted by kind, every case launches its kernels, and the record has all."""

import csv
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks import aot, build_table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/builds-2026-11-28"

CODE = """
.text.kernel:
.L_x_0:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0050*/                   LDG.E.U8 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0060*/                   LDGSTS.E.BYPASS.128 [R230], desc[UR6][R214.64], !P5 ;
        /*0070*/                   LDGSTS.E [R230], desc[UR6][R214.64], !P5 ;
        /*0080*/                   HGMMA.64x256x16.F32.BF16 R24, R184, gdesc[UR16].tnspB, R24 ;
        /*0090*/                   NOP ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/                   HMMA.16816.F32.BF16 R24, R184, R2, R24 ;
        /*00c0*/              @UP0 UTMALDG.2D [UR8], [UR4] ;
        /*00d0*/               @P2 BRA `(.L_x_0) ;
        /*00e0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00f0*/                   EXIT ;
.L_x_2:
        /*0100*/                   BRA `(.L_x_2);
        /*0110*/                   NOP;
"""


def test_machine_code_is_counted_by_kind():
    assert build_table.counted(CODE) == {
        "load_128": 1,
        "load_64": 1,
        "load_32": 1,
        "load_16": 1,
        "load_8": 1,
        "copy_128": 1,
        "copy_64": 0,
        "copy_32": 1,
        "tensor_copies": 1,
        "matrix_instructions": 2,
        "instructions": 16,
        "loops": "4",  # the outer loop is not innermost, and the last branch is no loop
    }


def test_machine_code_without_instructions_counts_nothing():
    assert not any(build_table.counted(".text.kernel:\n").values())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_case_launches_its_kernels(arch):
    names = []
    for case in build_table.cases():
        assert build_table.launches(case, arch), case.name
        names.append(case.name)
    assert len(set(names)) == len(names)


def test_a_kernel_that_is_not_launched_is_named():
    case = next(build_table.cases())._replace(kernels=("nce_kernel", "other_kernel"))
    with pytest.raises(RuntimeError, match=r"nce dense 16384x256: launches nce_kernel on sm_90, without other_kernel"):
        build_table.launches(case, "sm_90")


def test_the_launchers_are_restored_after_an_error():
    before = aot.common.launch, build_table.nce.launch, build_table.nce.architecture
    case = build_table.Case("broken", lambda: {}["missing"], ())
    with pytest.raises(KeyError):
        build_table.launches(case, "sm_90")
    assert (aot.common.launch, build_table.nce.launch, build_table.nce.architecture) == before


def test_the_interpreter_compiles_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as ended:
        build_table.main(["--out", str(tmp_path / "builds.csv")])
    assert ended.value.code == 2
    assert "unset it" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.name)
def test_a_record_has_every_case_and_no_spill(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {field.name for field in fields(build_table.Build)}
    assert {row["case"] for row in rows} == {case.name for case in build_table.cases()}
    assert {int(row["spill_bytes"]) for row in rows} == {0}
    assert all(int(row["instructions"]) > 0 for row in rows)
