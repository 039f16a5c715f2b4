//! What a vCPU costs in memory: printed (`cargo test -p dirtylimit-kvm memory -- --nocapture`), and bounded.

use dirtylimit_core::{Entry, Inline, Limiter, Shipped};

use crate::Vcpu;
use crate::harvest::Row;
use crate::shared::SharedVcpu;

#[test]
fn a_vcpu_takes_less_than_a_kibibyte_beside_its_ring() {
    const MORE: usize = 64;
    let core =
        (size_of::<Limiter<Shipped, Inline<{ 2 * MORE }>>>() - size_of::<Limiter<Shipped, Inline<MORE>>>()) / MORE;
    let (row, shared, vcpu) = (size_of::<Row>(), size_of::<SharedVcpu>(), size_of::<Vcpu>());
    let sum = core + row + shared + vcpu;
    let ring = 1024 * size_of::<Entry>();
    println!(
        "memory of a vCPU, bytes: {sum} (core's cells and row {core}, row {row}, shared {shared}, handle {vcpu}); \
         beside its ring, {ring} in the kernel at 1,024 entries"
    );
    assert!(core <= 320 && sum <= 1024);
    assert_eq!(ring, 16_384);
}
