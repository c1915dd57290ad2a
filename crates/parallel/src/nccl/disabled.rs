//! In place of NCCL where the feature is off.

use std::convert::Infallible;

use tch::Device;

use super::NcclLibraries;
use crate::{Communicator, Error, Result};

/// Never there.
pub(super) struct Loaded(Infallible);

impl Loaded {
    pub(super) fn load(_: &NcclLibraries) -> Result<Self> {
        Err(Error::FeatureOff { feature: "nccl" })
    }

    #[cfg_attr(feature = "nccl", allow(dead_code, reason = "compiled for its test alone"))]
    pub(super) fn join(self, _: Box<dyn Communicator>, _: Device) -> Result<Box<dyn Communicator>> {
        match self.0 {}
    }
}
