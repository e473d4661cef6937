"""What a training takes: time and memory of its steps alone."""

import time

import torch


class Meter:
    """Seconds, steps and peak bytes of the training alone: it stands still while a held-out loss is computed."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.seconds = 0.0
        self.steps = 0
        self.peak = 0

    def start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.pending = 0
        self.began = time.perf_counter()

    def stop(self, counts: bool = True) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        if counts:
            self.seconds += time.perf_counter() - self.began
            self.steps += self.pending
