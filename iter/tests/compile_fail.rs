//! What must not compile: the wrong direction, guest memory as a slice, a hold used twice.

#[cfg(test)]
mod compile_fail {
    /// The expected errors are those of the toolchain that the workspace names.
    #[test]
    fn the_types_refuse_it() {
        let cases = trybuild::TestCases::new();
        cases.compile_fail("tests/compile_fail/*.rs");
    }
}
