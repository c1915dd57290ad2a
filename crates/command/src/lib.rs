//! What every binary does alike: configuration, logging, exit codes, signals, progress
