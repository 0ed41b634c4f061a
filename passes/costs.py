from dataclasses import dataclass
@dataclass(frozen=True, kw_only=True)
class Rates:  # placeholder: overwritten by the costs author
    matmul_flops: float = 9e10
