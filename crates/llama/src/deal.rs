//! One pass over a weight for the files of several ranks.

use std::ops::Range;

use tch::Tensor;

use crate::{error::Result, plan::Shard};

/// Gives each file its part of a block of rows.
pub(crate) fn deal(
    shards: &[Shard],
    rows: &Range<i64>,
    block: &Tensor,
    append: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
) -> Result<()> {
    for (file, shard) in shards.iter().enumerate() {
        match shard {
            Shard::Replicated => append(file, block)?,
            Shard::Rows(slice) => {
                let own = slice.range();
                let both = own.start.max(rows.start)..own.end.min(rows.end);
                if !both.is_empty() {
                    let length = both.end - both.start;
                    append(file, &block.f_narrow(0, both.start - rows.start, length)?)?;
                }
            }
            Shard::Columns(slice) => {
                let own = slice.range();
                append(file, &block.f_narrow(1, own.start, own.end - own.start)?)?;
            }
        }
    }
    Ok(())
}
