"""Build the communication of DeepSpeed between processes of one machine, which it otherwise does on first use."""

from __future__ import annotations

from deepspeed.comm.torch import build_shm_op

if __name__ == "__main__":
    build_shm_op()
