"""The device side of the linear head; ``_linear_triton`` launches these and says in what order."""

from __future__ import annotations

from ._common import _IN_INTERPRETER, jit, store_rounded, tanh, tl
from ._gemm_kernel import _dot, _grouped, _halves


@jit
def _logit(x, bias_ptr, offs_v, mask_v, pre, post, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    return tanh(x * pre) * post if SOFTCAP else x * pre


@jit
def _online(z, m, s, zy, hit):
    m_new = tl.maximum(m, tl.max(z, 1))
    e = tl.exp(z - m_new[:, None])
    s_new = s * tl.exp(m - m_new) + tl.sum(e, 1)
    zy += tl.sum(tl.where(hit, z, 0.0), 1)
    return e, m_new, s_new, zy


@jit
def _fold(z, valid, hit, m, s, zy, total, t, q, EXTRAS: tl.constexpr):
    """Fold one logits tile into the statistics of its rows."""
    if EXTRAS:
        total += tl.sum(tl.where(valid, z, 0.0), 1)
    z = tl.where(valid, z, -float("inf"))
    e, m_new, s_new, zy = _online(z, m, s, zy, hit)
    if EXTRAS:
        step = m - m_new
        r = tl.exp(step)
        # 0·log 0 is 0: exp of -1e4 is 0, and 0 times it too, where -inf would give NaN.
        x = tl.maximum(z - m_new[:, None], -1e4)
        t = r * (t + s * step) + tl.sum(e * x, 1)
        q = r * r * q + tl.sum(e * e, 1)
    return m_new, s_new, zy, total, t, q


@jit
def _part(x, i):
    """Return part ``i`` of the three bfloat16 numbers that add up to float32 ``x``."""
    rest = x - x.to(tl.bfloat16).to(tl.float32)
    last = rest - rest.to(tl.bfloat16).to(tl.float32)
    return tl.where(i == 0, x, tl.where(i == 1, rest, last)).to(tl.bfloat16)


@jit
def _low_rank(
    acc, low_at, up_at, in_n, in_v, mask_n, mask_v, RANK: tl.constexpr, CUT: tl.constexpr
):
    """Return acc + low @ up.T of a tile; both are rows of RANK numbers, low float32.

    CUT: float32's precision from tensor cores: the six products of bfloat16 parts that matter. They
    keep the layout of the sums, where float32's own product would move them through memory. One
    dot in one loop: tensor memory holds a copy of the sums for each dot that is written.
    """
    in_r = tl.arange(0, 16)
    PRODUCTS: tl.constexpr = (3 if up_at.dtype.element_ty == tl.bfloat16 else 6) if CUT else 1
    for step in tl.range(0, PRODUCTS * ((RANK + 15) // 16), num_stages=1):
        offs_r = step // PRODUCTS * 16 + in_r
        mask_r = offs_r < RANK
        low = tl.load(
            low_at + in_n[:, None] * RANK + offs_r[None, :],
            mask=mask_n[:, None] & mask_r[None, :], other=0.0,
        )  # fmt: skip
        up = tl.load(
            up_at + in_v[None, :] * RANK + offs_r[:, None],
            mask=mask_v[None, :] & mask_r[:, None], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if CUT:
            # (low, up) parts: 0 0, 1 0, 2 0, 0 1, 1 1, 0 2.
            product = step % PRODUCTS
            i = product - product // 3 * 3 - product // 5 * 2
            j = product // 3 + product // 5
            acc = _dot(_part(low, i), _part(up, j), acc, _IN_INTERPRETER)
        else:
            acc = tl.dot(low, up, acc, input_precision="ieee")
    return acc


@jit
def _absorb(
    acc, ref_acc, lo, end, y, mask_n, bias_ptr, ref_bias_ptr, z_block, z_rows, pre, post,
    extrapolation, policy, ref, ext,
    HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    TRIPLE: tl.constexpr, EXTRAS: tl.constexpr, STATS: tl.constexpr, STORE_Z: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Turn a tile's sums into logits, store them (STORE_Z), fold them into the statistics.

    PIECES: how many pieces, left to right, since temporaries as wide as the tile would spill.
    """
    if PIECES > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        acc, acc_right = _halves(acc)
        ref_right = acc_right
        if TRIPLE:
            ref_acc, ref_right = _halves(ref_acc)
        policy, ref, ext = _absorb(
            acc, ref_acc, lo, end, y, mask_n, bias_ptr, ref_bias_ptr, z_block, z_rows, pre, post,
            extrapolation, policy, ref, ext,
            HAS_BIAS, HAS_REF_BIAS, SOFTCAP, TRIPLE, EXTRAS, STATS, STORE_Z, PIECES // 2,
        )  # fmt: skip
        policy, ref, ext = _absorb(
            acc_right, ref_right, lo + HALF, end, y, mask_n, bias_ptr, ref_bias_ptr, z_block,
            z_rows, pre, post, extrapolation, policy, ref, ext,
            HAS_BIAS, HAS_REF_BIAS, SOFTCAP, TRIPLE, EXTRAS, STATS, STORE_Z, PIECES // 2,
        )  # fmt: skip
    else:
        offs_v = lo + tl.arange(0, acc.shape[1])
        mask_v = offs_v < end
        valid = mask_v[None, :]
        z = _logit(acc, bias_ptr, offs_v, mask_v, pre, post, HAS_BIAS, SOFTCAP)
        if STORE_Z:
            tl.store(z_block + (z_rows[:, None] + offs_v[None, :]), z, mask=mask_n[:, None] & valid)
        if STATS:
            hit = offs_v[None, :] == y[:, None]
            policy = _fold(z, valid, hit, *policy, EXTRAS)
            if TRIPLE:
                ref_z = _logit(
                    ref_acc, ref_bias_ptr, offs_v, mask_v, pre, post, HAS_REF_BIAS, SOFTCAP
                )
                both = (1.0 + extrapolation) * z - extrapolation * ref_z
                both = tl.where(valid & (z != -float("inf")), both, -float("inf"))
                ref_z = tl.where(valid, ref_z, -float("inf"))
                _, ref_m, ref_s, ref_zy = _online(ref_z, *ref, hit)
                _, ext_m, ext_s, ext_zy = _online(both, *ext, hit)
                ref = (ref_m, ref_s, ref_zy)
                ext = (ext_m, ext_s, ext_zy)
    return policy, ref, ext


@jit
def _logits_kernel(
    x_ptr, ref_x_ptr, w_ptr, ref_w_ptr, bias_ptr, ref_bias_ptr, targets_ptr, part_ptr, z_ptr,
    low_ptr, up_ptr, N, V_begin, V_end, D, num_splits, split_size, stride_part,
    stride_xn, stride_xd, stride_rn, stride_rd, stride_wv, stride_wd, stride_sv, stride_sd,
    stride_zn, pre, post, extrapolation,
    HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    TRIPLE: tl.constexpr, SHARED: tl.constexpr, EXTRAS: tl.constexpr, STATS: tl.constexpr,
    STORE_Z: tl.constexpr, RANK: tl.constexpr, CUT: tl.constexpr, UPCAST: tl.constexpr,
    LOWEST: tl.constexpr, USE_TMA: tl.constexpr, PAIR: tl.constexpr, PIECES: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Statistics (STATS) or logits (STORE_Z) of one row block over one split of the vocabulary.

    PAIR: two neighbouring weight tiles meet each tile of hidden rows. They are folded one after
    the other, as two single tiles are, so it changes no bit.
    """
    pid_n, split = _grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_splits, GROUP)
    # Scalars reach a block in int64; inside it offsets are 32-bit, or they fill the registers.
    in_n = tl.arange(0, BLOCK_N)
    in_v = tl.arange(0, BLOCK_V)
    in_d = tl.arange(0, BLOCK_D)
    first = pid_n.to(tl.int64) * BLOCK_N
    mask_n = in_n < N - first
    y = tl.load(targets_ptr + first + in_n, mask=mask_n, other=-1).to(tl.int32)
    low = tl.full((BLOCK_N,), LOWEST, tl.float32)
    zero = tl.zeros((BLOCK_N,), tl.float32)
    policy = (low, zero, zero, zero, zero, zero)
    ref = (low, zero, zero)
    ext = (low, zero, zero)
    begin = split * split_size
    end = tl.minimum(V_begin + begin + split_size, V_end)
    row = pid_n * BLOCK_N
    if not USE_TMA:
        v_first = begin.to(tl.int64) + V_begin
        x_offs = in_n[:, None] * stride_xn + in_d[None, :] * stride_xd
        w_offs = in_v[None, :] * stride_wv + in_d[:, None] * stride_wd
        w_block = w_ptr + v_first * stride_wv
        if TRIPLE:
            ref_x_offs = in_n[:, None] * stride_rn + in_d[None, :] * stride_rd
            if not SHARED:
                ref_w_offs = in_v[None, :] * stride_sv + in_d[:, None] * stride_sd
                ref_w_block = ref_w_ptr + v_first * stride_sv
    if RANK:
        low_at = low_ptr + first * RANK
        up_at = up_ptr + (begin.to(tl.int64) + V_begin) * RANK
    if STORE_Z:
        z_block = z_ptr + first * stride_zn + begin
        z_rows = in_n * stride_zn - V_begin - begin
    else:
        z_block = z_ptr
        z_rows = in_n
    STEP: tl.constexpr = 2 * BLOCK_V if PAIR else BLOCK_V
    for lo in range(V_begin + begin, end, STEP):
        offs_v = lo + in_v
        mask_v = offs_v < end
        acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        other = acc  # the second tile's sums (PAIR) or the reference's (TRIPLE)
        if RANK:
            acc = _low_rank(acc, low_at, up_at, in_n, in_v, mask_n, mask_v, RANK, CUT)
            up_at += BLOCK_V * RANK
            if PAIR:
                mask_next = offs_v + BLOCK_V < end
                other = _low_rank(other, low_at, up_at, in_n, in_v, mask_n, mask_next, RANK, CUT)
                up_at += BLOCK_V * RANK
        if not USE_TMA:
            x_at = x_ptr + first * stride_xn
            w_at = w_block
            if TRIPLE:
                ref_x_at = ref_x_ptr + first * stride_rn
                if not SHARED:
                    ref_w_at = ref_w_block
        for d in range(0, D, BLOCK_D):
            if USE_TMA:
                x = x_ptr.load([row, d])
                w = w_ptr.load([lo, d]).T
                acc = _dot(x, w, acc, UPCAST)
                if PAIR:
                    other = _dot(x, w_ptr.load([lo + BLOCK_V, d]).T, other, UPCAST)
                if TRIPLE:
                    if not SHARED:
                        w = ref_w_ptr.load([lo, d]).T
                    other = _dot(ref_x_ptr.load([row, d]), w, other, UPCAST)
            else:
                mask_d = in_d < D - d
                mask_nd = mask_n[:, None] & mask_d[None, :]
                mask_dv = mask_d[:, None] & mask_v[None, :]
                x = tl.load(x_at + x_offs, mask=mask_nd, other=0.0)
                w = tl.load(w_at + w_offs, mask=mask_dv, other=0.0)
                acc = _dot(x, w, acc, UPCAST)
                if PAIR:
                    next_v = mask_d[:, None] & (offs_v + BLOCK_V < end)[None, :]
                    w = tl.load(w_at + BLOCK_V * stride_wv + w_offs, mask=next_v, other=0.0)
                    other = _dot(x, w, other, UPCAST)
                x_at += BLOCK_D * stride_xd
                w_at += BLOCK_D * stride_wd
                if TRIPLE:
                    ref_x = tl.load(ref_x_at + ref_x_offs, mask=mask_nd, other=0.0)
                    ref_x_at += BLOCK_D * stride_rd
                    if not SHARED:
                        w = tl.load(ref_w_at + ref_w_offs, mask=mask_dv, other=0.0)
                        ref_w_at += BLOCK_D * stride_sd
                    other = _dot(ref_x, w, other, UPCAST)
        if not USE_TMA:
            w_block += STEP * stride_wv
            if TRIPLE and not SHARED:
                ref_w_block += STEP * stride_sv
        policy, ref, ext = _absorb(
            acc, other, lo, end, y, mask_n, bias_ptr, ref_bias_ptr, z_block, z_rows, pre, post,
            extrapolation, policy, ref, ext,
            HAS_BIAS, HAS_REF_BIAS, SOFTCAP, TRIPLE, EXTRAS, STATS, STORE_Z, PIECES,
        )  # fmt: skip
        if PAIR:
            policy, ref, ext = _absorb(
                other, other, lo + BLOCK_V, end, y, mask_n, bias_ptr, ref_bias_ptr, z_block,
                z_rows, pre, post, extrapolation, policy, ref, ext,
                HAS_BIAS, HAS_REF_BIAS, SOFTCAP, TRIPLE, EXTRAS, STATS, STORE_Z, PIECES,
            )  # fmt: skip
    if STATS:
        NUM: tl.constexpr = 6 if EXTRAS else 3
        base = part_ptr + split.to(tl.int64) * N + first + in_n
        for i in tl.static_range(NUM):
            tl.store(base + i * stride_part, policy[i], mask=mask_n)
        if TRIPLE:
            for i in tl.static_range(3):
                tl.store(base + (NUM + i) * stride_part, ref[i], mask=mask_n)
                tl.store(base + (2 * NUM + i) * stride_part, ext[i], mask=mask_n)


@jit
def _combine_kernel(
    part_ptr, state_ptr, scale_ptr, N, num_splits, stride_part,
    EXTRAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold ``part [models, NUM, splits, N]`` into ``state [models, NUM, N]``, split after split.

    ``scale [N]`` receives exp(m_old - m_new) of the policy: what the Jacobian's sums shrink by.
    """
    NUM: tl.constexpr = 6 if EXTRAS else 3
    model = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    state = state_ptr + model * NUM * N + offs_n
    m_old = tl.load(state, mask=mask, other=0.0)
    m = m_old
    s = tl.load(state + N, mask=mask, other=0.0)
    zy = tl.load(state + 2 * N, mask=mask, other=0.0)
    if EXTRAS:
        total = tl.load(state + 3 * N, mask=mask, other=0.0)
        t = tl.load(state + 4 * N, mask=mask, other=0.0)
        q = tl.load(state + 5 * N, mask=mask, other=0.0)
    part = part_ptr + model * NUM * stride_part + offs_n
    for i in range(0, num_splits):
        at = part + i * N
        m_i = tl.load(at, mask=mask, other=0.0)
        s_i = tl.load(at + stride_part, mask=mask, other=0.0)
        m_new = tl.maximum(m, m_i)
        a = tl.exp(m - m_new)
        b = tl.exp(m_i - m_new)
        zy += tl.load(at + 2 * stride_part, mask=mask, other=0.0)
        if EXTRAS:
            total += tl.load(at + 3 * stride_part, mask=mask, other=0.0)
            t_i = tl.load(at + 4 * stride_part, mask=mask, other=0.0)
            q_i = tl.load(at + 5 * stride_part, mask=mask, other=0.0)
            t = a * (t + s * (m - m_new)) + b * (t_i + s_i * (m_i - m_new))
            q = a * a * q + b * b * q_i
        s = a * s + b * s_i
        m = m_new
    tl.store(state, m, mask=mask)
    tl.store(state + N, s, mask=mask)
    tl.store(state + 2 * N, zy, mask=mask)
    if EXTRAS:
        tl.store(state + 3 * N, total, mask=mask)
        tl.store(state + 4 * N, t, mask=mask)
        tl.store(state + 5 * N, q, mask=mask)
    if model == 0:
        tl.store(scale_ptr + offs_n, tl.exp(m_old - m), mask=mask)


@jit
def _weights_kernel(
    z_ptr, out_ptr, m_ptr, s_ptr, g_ptr, g_entropy_ptr, entropy_ptr, targets_ptr,
    N, V_begin, V_size, stride_zn, ignore_index, slope_scale,
    SOFTCAP: tl.constexpr, BACKWARD: tl.constexpr, HAS_G: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write exp(z - m)·f' or, for BACKWARD, f'·(g·(1[y] - p) - g_entropy·p·(log p + entropy)).

    The former is 0 at the target: p_y near 1, rounded to 8 bits, would drown a confident token's
    small Jacobian, so _jacobian_kernel adds that entry unrounded.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_v < V_size)[None, :]
    offs = offs_n.to(tl.int64)[:, None] * stride_zn + offs_v[None, :]
    z = tl.load(z_ptr + offs, mask=mask, other=0.0)
    m = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0)
    x = z - m[:, None]
    out = tl.exp(x)
    y = tl.load(targets_ptr + offs_n, mask=mask_n, other=0)
    hit = (V_begin + offs_v).to(tl.int64)[None, :] == y[:, None]
    if BACKWARD:
        s = tl.load(s_ptr + offs_n, mask=mask_n, other=1.0)
        g = tl.zeros((BLOCK_N,), tl.float32)
        if HAS_G:
            g = tl.load(g_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        factor = (-g / s)[:, None] + tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        if ENTROPY:
            g_h = tl.load(g_entropy_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            h = tl.load(entropy_ptr + offs_n, mask=mask_n, other=0.0)
            log_p = tl.maximum(x, -1e4) - tl.log(s)[:, None]
            factor -= (g_h / s)[:, None] * (log_p + h[:, None])
        out = out * factor + tl.where(hit, g[:, None], 0.0)
    else:
        out = tl.where(hit, 0.0, out)
    if SOFTCAP:
        u = z * slope_scale
        out *= 1.0 - u * u
    if BACKWARD:  # last: a row without a target may hold NaN, in its logits too
        out = tl.where((y != ignore_index)[:, None], out, 0.0)
    store_rounded(out_ptr + offs, out, mask)


@jit
def _jacobian_kernel(
    acc_ptr, w_ptr, m_ptr, s_ptr, zy_ptr, targets_ptr, out_ptr, N, V, D, stride_wv, stride_wd,
    stride_on, k, slope_scale, ignore_index,
    SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """J = k·(f'_y·(1 - p_y)·weight[y] - acc / s); 0 in rows without a target."""
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    y = tl.load(targets_ptr + offs_n, mask=mask_n, other=ignore_index)
    live = (y != ignore_index) & (y >= 0) & (y < V)
    w_offs = y[:, None] * stride_wv + offs_d[None, :] * stride_wd
    w = tl.load(w_ptr + w_offs, mask=mask & live[:, None], other=0.0).to(tl.float32)
    zy = tl.load(zy_ptr + offs_n, mask=mask_n, other=0.0)
    s = tl.load(s_ptr + offs_n, mask=mask_n, other=1.0)
    log_p = zy - tl.load(m_ptr + offs_n, mask=mask_n, other=0.0) - tl.log(s)
    factor = -tanh(0.5 * log_p) * (tl.exp(log_p) + 1.0)  # 1 - p_y, exact where p_y is near 1
    if SOFTCAP:
        u = zy * slope_scale
        factor *= 1.0 - u * u
    w *= factor[:, None]
    acc = tl.load(acc_ptr + offs_n[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    out = tl.where(live[:, None], k * (w - acc / s[:, None]), 0.0)
    at = out_ptr + offs_n[:, None] * stride_on + offs_d[None, :]
    store_rounded(at, out, mask)
