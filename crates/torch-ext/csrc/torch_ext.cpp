// libtorch operations that tch does not bind.
