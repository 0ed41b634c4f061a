"""The lab: two processes over an emulated slow link, every variant interleaved in one run."""
