"""Reading the stand-ins' log, and judging it."""

from __future__ import annotations

import copy

import pytest

from tools.standin import log, names, verdict

COPY = "launch\ttorch\teager\tcopy_kernel\tgrid 48 1 1 block 128 1 1 shared 0"
SEED = "launch\ttorch\teager\tfill_kernel\tgrid 1 1 1 block 128 1 1 shared 0"
DEMANGLED = {
    "copy_kernel": "void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::"
    "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(float)#1}>(int, float)",
    "fill_kernel": "void at::native::vectorized_elementwise_kernel<2, at::native::FillFunctor<long>, "
    "std::array<char*, 1ul> >(int, at::native::FillFunctor<long>, std::array<char*, 1ul>)",
}
CAPTURED = ["launch\ttriton\tcaptured\tnce_kernel\tgrid 4 1 1 block 128 1 1 shared 1024"] * 2
REPLAY = [COPY, COPY, SEED, SEED, "graph\teager\t1\t2"]
RECORD = [COPY, COPY, "sync\teager\tcudaDeviceSynchronize", "sync\teager\tcudaFree", SEED, SEED]
RESULT = {"obstacle": "", "captured": True, "warnings": [], "kinds": 1}


def good() -> dict[str, list[str]]:
    """Return the log of a case without problems, by the marks of its steps."""
    steps = {
        "step 0 warm plain": ["alloc\teager\tcudaMalloc\t2097152", "sync\teager\tcudaDeviceSynchronize"],
        "step 1 warm plain": [CAPTURED[0].replace("captured", "eager")],
        "step 3 record plain": [*RECORD, "capture\tbegin\t1", *CAPTURED, "capture\tend\t1\t2", *REPLAY[2:]],
        "step 4 replay plain": REPLAY,
        "end": ["sync\teager\tcudaDeviceSynchronize"],
    }
    return copy.deepcopy(steps)


@pytest.fixture(autouse=True)
def demangler(monkeypatch):
    """No need for c++filt, which `make capture` checks."""
    monkeypatch.setattr(names, "demangle", lambda mangled: {name: DEMANGLED[name] for name in mangled})


def judge(steps: dict[str, list[str]], **result) -> verdict.Verdict:
    lines = ["stub\tcublasSetWorkspace_v2"]
    for mark, events in steps.items():
        lines += [f"mark\t{mark}", *events]
    return verdict.judge(log.parse(f"{line}\n" for line in lines), RESULT | result)


def test_marks_of_steps():
    assert log.mark_of_step(2, 3, False) == "step 2 warm plain"
    assert log.mark_of_step(3, 3, True) == "step 3 record flipped"
    assert log.mark_of_step(4, 3, False) == "step 4 replay plain"
    section = log.Section("step 3 record flipped")
    assert (section.number, section.phase) == (3, "record")
    assert (log.Section("end").number, log.Section("").phase) == (-1, "")


def test_lines_become_events():
    lines = [
        "launch\ttriton\tcaptured\tnce_kernel\tgrid 1 2 3",
        "mark\tstep 0 warm plain",
        "error\tcudaMalloc\t2\tfull",
    ]
    before, step = log.parse(lines)
    assert before.events == [log.Event("launch", "triton", "captured", "nce_kernel", ("grid 1 2 3",))]
    assert step.find("error") == [log.Event("error", "", "", "cudaMalloc", ("2", "full"))]
    assert before.find("launch", "eager") == []
    with pytest.raises(ValueError, match="not a line of the stand-ins' log: 'launch"):
        log.parse(["launch\ttriton"])


def test_a_good_case_passes():
    found = judge(good())
    assert found.problems == []
    assert (found.captures, found.graph_launches, found.replays, found.syncs) == (1, 2, 1, 0)
    assert found.launches == {"triton nce_kernel": 2}


FAULTS = {
    "a wait in a warm step": ("step 1 warm plain", 0, "sync\teager\tcudaStreamSynchronize", "1 x cudaStreamSynch"),
    "a wait in the capture": ("step 3 record plain", 7, "sync\toutside\tcudaMemcpy", "in the capture: 1 x cudaMemcpy"),
    "a wait around the capture": ("step 3 record plain", 0, "sync\teager\tcudaMemcpy", "around the capture: 1 x"),
    "a wait after the capture": (
        "step 3 record plain",
        11,
        "sync\teager\tcudaFree",
        "around the capture: 1 x cudaFree",
    ),
    "a wait in a replay": ("step 4 replay plain", 2, "sync\teager\tcudaDeviceSynchronize", "1 x cudaDeviceSynchronize"),
    "an allocation in a replay": ("step 4 replay plain", 0, "alloc\teager\tcudaMalloc\t64", "cudaMalloc of 64 bytes"),
    "another kernel beside the graph": (
        "step 4 replay plain",
        0,
        CAPTURED[0].replace("captured", "eager"),
        "1 x triton nce_kernel beside the graph",
    ),
    "a third copy": ("step 4 replay plain", 0, COPY, "3 x torch elementwise_kernel direct_copy_kernel_cuda float"),
    "a launch outside": (
        "step 3 record plain",
        7,
        CAPTURED[0].replace("captured", "outside"),
        "1 x triton nce_kernel outside of the capture",
    ),
    "a second graph": ("step 4 replay plain", 0, "graph\teager\t1\t2", r"graphs of \[2, 2\] launches"),
    "an error": ("end", 0, "error\tcudaStreamWaitEvent\t905\tan event", "cudaStreamWaitEvent failed: 905 an event"),
    "a second capture": ("step 3 record plain", 11, "capture\tbegin\t2", "not exactly one capture"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_a_problem(fault):
    step, place, line, problem = FAULTS[fault]
    steps = good()
    steps[step].insert(place, line)
    problems = judge(steps).problems
    assert problems
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(" | ".join(problems))


def test_many_kernels_are_counted_instead_of_named():
    steps = good()
    steps["step 4 replay plain"] += [f"launch\ttriton\teager\tkernel_{i}\tgrid 1 1 1" for i in range(20)]
    problems = judge(steps).problems
    assert len(problems) == verdict.MOST_LINES + 1
    assert problems[-1] == "step 4 replay plain: 12 more kernels beside the graph"


def test_a_graph_that_is_not_replayed_is_a_problem():
    steps = good()
    steps["step 4 replay plain"].pop()
    assert judge(steps).problems == ["step 4 replay plain: graphs of [] launches replayed, not one of at least 1"]


def test_a_graph_with_other_launches_is_a_problem():
    steps = good()
    steps["step 3 record plain"][-1] = "graph\teager\t1\t3"
    assert judge(steps).problems == ["step 3 record plain: graphs of [3] launches replayed, not one of 2"]


def test_what_the_process_reports_is_a_problem():
    assert judge(good(), obstacle="not captured").problems == ["not captured"]
    assert judge(good(), warnings=["the step runs uncaptured"]).problems == ["a warning: the step runs uncaptured"]
    uncaptured = good() | {"step 4 replay plain": [CAPTURED[0].replace("captured", "eager")]}
    assert judge(uncaptured, captured=False, obstacle="capture failed: 900").problems == ["capture failed: 900"]
    assert len(judge(uncaptured, captured=False).problems) > 1
    assert judge(good(), kinds=2).problems == ["1 captures for 2 kinds of steps"]


def test_short_names():
    assert names.short_torch_name(DEMANGLED["copy_kernel"]) == "elementwise_kernel direct_copy_kernel_cuda float"
    assert names.short_torch_name(DEMANGLED["fill_kernel"]) == "vectorized_elementwise_kernel FillFunctor long"
    assert names.short_triton_name("nce_kernel") == "nce_kernel"
    assert names.short_triton_name("triton_poi_fused_add_mul_12") == "inductor pointwise"
    assert names.short_triton_name("triton_per_fused_sum_3") == "inductor persistent reduction"
