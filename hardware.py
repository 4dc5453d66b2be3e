"""What a device can do, and how a step is timed and fed without waiting for a GPU.

A program that uses a GPU only queues work there and goes on. It waits when it reads a number back.
While it waits it queues nothing, so the GPU then idles until there is more: train.py's loop reads
once a step.
"""
import functools
import time
from typing import NamedTuple

import torch


class GPU(NamedTuple):
    """By data sheets: SXM, products without sparsity; memory as nvidia-smi reports it."""
    bf16: float                  # FLOP/s of matrix products
    fp8: float                   # the same; 0.0: it has no such units
    bandwidth: float             # of its memory, bytes/s
    memory: float                # bytes
    link: float                  # to the other seven of its node, bytes/s each way
    names: tuple                 # torch.cuda.get_device_name of those that have this bf16 peak


# Left out on purpose: 'NVIDIA H100 PCIe' (756 TFLOP/s) and slices of a GPU (MIG)
GPUS = {'a100': GPU(312e12, 0.0, 2.04e12, 85e9, 300e9,
                    ('NVIDIA A100-SXM4-40GB', 'NVIDIA A100-SXM4-80GB',
                     'NVIDIA A100-PCIE-40GB', 'NVIDIA A100 80GB PCIe')),
        'h100': GPU(989e12, 1979e12, 3.35e12, 85e9, 450e9, ('NVIDIA H100 80GB HBM3',)),
        'h200': GPU(989e12, 1979e12, 4.8e12, 150e9, 450e9, ('NVIDIA H200',)),
        'b200': GPU(2250e12, 4500e12, 7.7e12, 190e9, 900e9, ('NVIDIA B200',))}


@functools.cache
def has_bf16(device):
    """Whether 'cuda', 'cpu' or 'mps' multiplies bf16 in hardware.

    A CPU without such units takes hundreds of times as long for it as for fp32.
    """
    if device == 'cpu':
        return torch.cpu._is_avx512_bf16_supported()
    if device == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return False


def matmul_dtype(device):
    """bf16 where the hardware multiplies it, else fp32."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def product_dtype(x):
    """dtype in which x is multiplied: autocast's where that is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def peak_flops(device, dtype):
    """FLOP/s that the device can do at most, of which MFU is a share; 0.0: not known.

    Of a GPU in GPUS it is the data sheet's for bf16, whatever a run computes in. Of a CPU and MPS
    it is measured in dtype: of a rank's own cores, as all ranks measure at the same time.
    """
    if device.type != 'cuda':
        return gemm_flops(device, dtype, seconds=0.05)
    name = torch.cuda.get_device_name(device)
    for gpu in GPUS.values():
        if name in gpu.names:
            return gpu.bf16
    return 0.0


def gemm_flops(device, dtype, seconds):
    """FLOP/s of the fastest of some square matrix products, two of each size.

    Sizes double until so many seconds have passed; the last product may take three times as long.
    Numbers come from a generator of their own: those that a run draws stay what they are.
    """
    generator = torch.Generator(device).manual_seed(0)

    def product(n):
        a = torch.randn(n, n, device=device, generator=generator).to(dtype)
        began = time.perf_counter()
        (a @ a)[0, 0].item()                                     # waits for the GPU
        return 2 * n**3 / (time.perf_counter() - began)

    product(128)                                                 # starts threads
    best, n, start = 0.0, 256, time.perf_counter()
    while True:
        for _ in range(2):
            best = max(best, product(n))
            if time.perf_counter() - start > seconds:
                return best
        n = min(2 * n, 8192)


def to_device(t, device):
    """A tensor of the CPU on the device. A GPU fetches it from pinned memory, without a wait."""
    if device.type != 'cuda':
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)


class StepClock:
    """Seconds of a step's passes and of its optimizer, by three marks around them.

    On a GPU a mark is an event in its queue. It has a time once the GPU has come by, so that of
    the optimizer is read a step later.
    """
    def __init__(self, device):
        self.device, self.marks = device, []
        self.kind = None                                         # of the optimizer in the last step
        self.last_step = None                                    # the marks around it

    def mark(self):
        """Before the passes, after them, after the optimizer's step."""
        if self.device.type == 'cuda':
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
            return
        if self.device.type != 'cpu':                            # MPS is waited for
            torch.accelerator.synchronize()
        self.marks.append(time.perf_counter())

    def seconds(self, kind):
        """(of the passes, of the optimizer's step), after the loop has read the passes' loss.

        kind: of the optimizer. On a GPU its seconds are those of the step before, and only the
        first step of a kind is waited for.
        """
        began, passed, ended = self.marks
        self.marks = []
        if self.device.type != 'cuda':
            return passed - began, ended - passed
        if kind != self.kind:
            torch.cuda.synchronize()
            self.kind, self.last_step = kind, (passed, ended)
        before, after = self.last_step
        self.last_step = passed, ended
        return began.elapsed_time(passed) / 1000, before.elapsed_time(after) / 1000
