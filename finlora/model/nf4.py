"""NF4's sixteen numbers (arXiv:2305.14314, appendix E) in bfloat16, looked up in registers by PTX.

Input $4: four bytes, each an even column in its high half and an odd one in its low half. Outputs $0 and $1: the four even
columns, $2 and $3: the four odd ones, two bfloat16 each.

The low bytes of the numbers are one table of 16 bytes, the high bytes another. `prmt` looks four of them up at once by their low
three bits, in the lower and in the upper half of a table, and bit 3 chooses between both: a byte of m is 0xff where it is 0.
"""

UNPACK_NF4 = """\
{
.reg .b32 s, t, m, lo, hi, la, ha, lb, hb;
and.b32 s, $4, 0x7777;
and.b32 t, $4, 0x8888;
prmt.b32 m, 0x7f, 0, t;
shl.b32 t, m, 1;
or.b32 m, m, t;
prmt.b32 lo, 0xca063280, 0x00ba3d92, s;
prmt.b32 hi, 0xad7c25a3, 0x803910e2, s;
lop3.b32 la, lo, hi, m, 0xe4;
prmt.b32 lo, 0xbebfbfbf, 0x00bdbebe, s;
prmt.b32 hi, 0x3e3e3e3d, 0x3f3f3f3e, s;
lop3.b32 ha, lo, hi, m, 0xe4;
shr.u32 t, $4, 16;
and.b32 s, t, 0x7777;
and.b32 t, t, 0x8888;
prmt.b32 m, 0x7f, 0, t;
shl.b32 t, m, 1;
or.b32 m, m, t;
prmt.b32 lo, 0xca063280, 0x00ba3d92, s;
prmt.b32 hi, 0xad7c25a3, 0x803910e2, s;
lop3.b32 lb, lo, hi, m, 0xe4;
prmt.b32 lo, 0xbebfbfbf, 0x00bdbebe, s;
prmt.b32 hi, 0x3e3e3e3d, 0x3f3f3f3e, s;
lop3.b32 hb, lo, hi, m, 0xe4;
prmt.b32 $0, la, ha, 0x7351;
prmt.b32 $1, lb, hb, 0x7351;
prmt.b32 $2, la, ha, 0x6240;
prmt.b32 $3, lb, hb, 0x6240;
}
"""
