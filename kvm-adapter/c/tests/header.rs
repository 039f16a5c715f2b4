//! `include/dirtylimit.h` is what cbindgen makes of the sources, and names what the library has.
//!
//! With `DIRTYLIMIT_WRITE_HEADER` set the header is written instead of compared.

use std::path::Path;

/// In the order of the header.
const SOURCES: [&str; 5] = ["answer", "vm", "vcpu", "round", "status"];

#[test]
fn the_header_is_that_of_the_sources() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(package.join("cbindgen.toml")).unwrap();
    let builder = SOURCES.iter().fold(cbindgen::Builder::new().with_config(config), |builder, name| {
        builder.with_src(package.join("src").join(name).with_extension("rs"))
    });
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let (made, path) = (String::from_utf8(made).unwrap(), package.join("include/dirtylimit.h"));
    if std::env::var_os("DIRTYLIMIT_WRITE_HEADER").is_some() {
        std::fs::write(path, made).unwrap();
        return;
    }
    let kept = std::fs::read_to_string(path).unwrap();
    let differs = made.lines().zip(kept.lines()).find(|(made, kept)| made != kept);
    assert!(
        made == kept,
        "include/dirtylimit.h is not that of the sources ({differs:?}): DIRTYLIMIT_WRITE_HEADER=1 cargo test -p dirtylimit-c"
    );
}
