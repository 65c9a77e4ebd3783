"""Mutants that change nothing that a test could notice, with the reason: path, changed lines before and after."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "src/simulator/metal/address_spaces.h",
        "simdgroup_matrix<B, 8, 8>& b, simdgroup_matrix<C, 8, 8>& c);",
        "simdgroup_matrix<B, 8, 8>& b, simdgroup_matrix<C, 8, 9>& c);",
    ): "declared for a front end that says of which address space a name is, and whose errors do not count; it returns nothing",
}
