"""Mutants that change nothing that a test could notice, with the reason: path, changed lines before and after."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "tilelang_ext/rocm/spelling.py",
        'if isinstance(value, _OPERATORS) and dtype in ("int8", "int16", "uint8", "uint16"):',
        'if isinstance(value, _OPERATORS) or dtype in ("int8", "int16", "uint8", "uint16"):',
    ): "the mask takes the bits that a reinterpretation takes, and there are no operators of 8-bit floats",
    (
        "tilelang_ext/passes/staged_operands.py",
        'StageOperands = prim_func_pass(_stage, opt_level=0, name="tilelang_ext.StageOperands")',
        'StageOperands = prim_func_pass(_stage, opt_level=1, name="tilelang_ext.StageOperands")',
    ): "nobody lowers at level 0",
    (
        "tilelang_ext/passes/staged_operands.py",
        "_READ, _WRITE = 1, 2",
        "_READ, _WRITE = 1, 3",
    ): "a copy's destination is written, whatever else its region says",
    (
        "tilelang_ext/passes/updates.py",
        "return False",
        "return True",
    ): "of a loop that is found the loops inside are found too, and never come to, since it is replaced as a whole",
    (
        "src/metal/prelude_numbers.cc",
        "q = fma(q, t, float$(-7.569686190e-04f));",
        "q = fma(t, q, float$(-7.569686190e-04f));",
    ): "a product has no order",
    (
        "src/metal/codegen_expression.cc",
        "if (t.lanes() <= 4) {",
        "if (t.lanes() < 4) {",
    ): "four lanes are one chunk of the other form: the same value by way of a variable",
    (
        "src/simulator/metal/address_spaces.h",
        "simdgroup_matrix<B, 8, 8>& b, simdgroup_matrix<C, 8, 8>& c);",
        "simdgroup_matrix<B, 8, 8>& b, simdgroup_matrix<C, 8, 9>& c);",
    ): "declared for a front end that says of which address space a name is, and whose errors do not count; it returns nothing",
    (
        "tilelang_ext/passes/float_constants.py",
        '_MANTISSA_BITS = {"float32": 24, "float64": 53}',
        '_MANTISSA_BITS = {"float32": 24, "float64": 54}',
    ): "an even integer times the power of two below: the same number, by a longer name",
    (
        "src/simulator/hip/atomic.h",
        "SIM_ATOMIC(atomicMax, x < y ? y : x)",
        "SIM_ATOMIC(atomicMax, x <= y ? y : x)",
    ): "of two equal numbers either is the maximum",
    (
        "src/launch/torch.cc",
        "intptr_t bytes = 0;",
        "intptr_t bytes = 1;",
    ): "the call that follows writes it, or returns no text",
    (
        "tilelang_ext/rocm/half_sums.py",
        "for var, extent in reversed(list(zip(variables, source.shape, strict=True))):",
        "for var, extent in reversed(list(zip(variables, source.shape, strict=False))):",
    ): "one variable is made for each extent",
    (
        "tilelang_ext/program/program.py",
        "[a if p.shape is None else None for p, a in zip(self.parameters, given, strict=True)],",
        "[a if p.shape is None else None for p, a in zip(self.parameters, given, strict=False)],",
    ): "one value is given for each parameter",
    (
        "src/metal/codegen_expression.cc",
        """stream << "*(" << p.space << ' ' << Type(t) << "*)(" << Add(p.text, at) << ") = " << value << ";\\n";""",
        """stream << "*(" << p.space << ' ' << Type(t) << "*)(" << Add(at, p.text) << ") = " << value << ";\\n";""",
    ): "a pointer and an index may be added in either order",
    (
        "tilelang_ext/passes/outside.py",
        'PlaceMarks = prim_func_pass(_place_all, opt_level=0, name="tilelang_ext.PlaceMarks")',
        'PlaceMarks = prim_func_pass(_place_all, opt_level=1, name="tilelang_ext.PlaceMarks")',
    ): "TVM runs passes of up to level 2 unless it is told otherwise, and tilelang those of up to 3",
    (
        "tilelang_ext/passes/float_arithmetic.py",
        'KeepFloatArithmetic = prim_func_pass(_keep_all, opt_level=0, name="tilelang_ext.KeepFloatArithmetic")',
        'KeepFloatArithmetic = prim_func_pass(_keep_all, opt_level=1, name="tilelang_ext.KeepFloatArithmetic")',
    ): "TVM runs passes of up to level 2 unless it is told otherwise, and tilelang those of up to 3",
    (
        "tilelang_ext/program/arguments.py",
        "if not isinstance(factor, tirx.IntImm) or not isinstance(rest, tirx.IntImm) or not int(factor):",
        "if not isinstance(factor, tirx.IntImm) or not isinstance(rest, tirx.IntImm) and not int(factor):",
    ): "all other variables being known the rest is a number; upstream refuses an extent that its variable does not change",
    (
        "tilelang_ext/language/gemm_blockscaled.py",
        "if not equal(first, second):",
        "if not equal(second, first):",
    ): "equality has no order",
}
