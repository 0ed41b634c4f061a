"""farskip_fx: FarSkip connectivity for Mixture-of-Experts models, as a torch.compile graph transformation."""
