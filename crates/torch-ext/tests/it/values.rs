use dromedary_torch_ext::F32Buffer;
use tch::{Kind, Tensor};

use crate::{FLOAT, message};

#[test]
fn values_of_any_kind_are_taken_over_row_by_row_into_the_first_ones() {
    let values = Tensor::randn([3, 5], FLOAT);
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let source = values.to_kind(kind).tr(); // (5, 3), not contiguous
        let mut buffer = F32Buffer::zeros(&[4, 5]).unwrap();
        buffer.values_mut().fill(7.0);
        buffer.convert_from(&source).unwrap();
        let want = source.to_kind(Kind::Float).contiguous().view([-1]);
        let want = Vec::<f32>::try_from(want).unwrap();
        assert_eq!(buffer.values()[..15], want);
        assert_eq!(buffer.values()[15..], [7.0; 5]);
    }
}

#[test]
fn more_values_than_there_is_room_for_are_refused() {
    let mut buffer = F32Buffer::zeros(&[2, 2]).unwrap();
    let error = message(buffer.convert_from(&Tensor::zeros([5], FLOAT)));
    assert!(error.contains("conversion to f32") && error.contains("dimension size"), "{error}");
}
