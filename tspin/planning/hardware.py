"""What `tspin plan` takes for granted of machines: GPUs, disks, networks, starts. Each number says its source."""

from dataclasses import dataclass

from tspin.errors import UserError, unknown


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. flops: dense bfloat16, per second. bandwidth: bytes per second. Vendors' public figures."""

    memory: float
    flops: float
    bandwidth: float


GPUS = {
    "h200": Gpu(141e9, 989e12, 4.80e12),
    "h100": Gpu(80e9, 989e12, 3.35e12),
    "a100": Gpu(80e9, 312e12, 2.04e12),
    "a100-40": Gpu(40e9, 312e12, 1.56e12),
    "l40s": Gpu(48e9, 362e12, 0.864e12),
    "rtx4090": Gpu(24e9, 165e12, 1.01e12),
}


@dataclass(frozen=True)
class Assumption:
    """A number that no config says. text: the number in words. source: where it is from, or "assumed"."""

    value: float
    text: str
    source: str


USABLE = Assumption(0.95, "95 % of a GPU's memory", "assumed: driver, libraries and fragments take the rest")
NETWORK = Assumption(400.0, "400 Gb/s a machine", "NVIDIA ConnectX-7, one port; a DGX H100 has eight, see --network")
DISK = Assumption(1e9, "1 GB/s of disk", "assumed: a shared file system; a local NVMe disk is faster")
HASHING = Assumption(1e9, "1 GB/s of SHA-256", "assumed: one core with SHA instructions")
PROCESS_START = Assumption(20.0, "20 s a start", "results/benchmarks/times/commands.csv, `tspin run --preset pocket`")
ENGINE_START = Assumption(90.0, "90 s more for vLLM", "assumed: it compiles and records graphs")
BENCHMARKS = Assumption(0.0, "benchmarks' sizes", "tspin/planning/benchmarks.yaml")
ASSUMPTIONS = (USABLE, NETWORK, DISK, HASHING, PROCESS_START, ENGINE_START, BENCHMARKS)


@dataclass(frozen=True)
class Hardware:
    """Machines with GPUs of one kind, and the share of their arithmetic, and of their bandwidth, that is reached.

    gpus: of a machine. network: Gb/s between one machine and the others. Raises UserError for an unknown kind.
    """

    gpus: int = 8
    gpu: str = "h100"
    utilisation: float = 0.4
    nodes: int = 1
    network: float = NETWORK.value

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(f"--gpu: {unknown('GPU', self.gpu, GPUS)}")

    @property
    def all_gpus(self) -> int:
        """Of all machines."""
        return self.gpus * self.nodes

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory that tensors can take."""
        return USABLE.value * GPUS[self.gpu].memory

    @property
    def flops(self) -> float:
        """Of one GPU, as reached."""
        return GPUS[self.gpu].flops * self.utilisation

    @property
    def bandwidth(self) -> float:
        """Of one GPU's memory, as reached: bytes per second."""
        return GPUS[self.gpu].bandwidth * self.utilisation

    def exchange_seconds(self, size: float) -> float:
        """To bring so many bytes, which lie in equal parts on all machines, to each of them, or to add them up."""
        return size * (self.nodes - 1) / self.nodes / (self.network * 1e9 / 8)
