"""The stages: resolve inputs, compute, log. Thin; the work is in the layers below."""
