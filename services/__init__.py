"""The service around dpo_core: control plane, training, serving, and the raydpo command."""
