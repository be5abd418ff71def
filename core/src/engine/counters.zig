//! What the engine counts. One enum is the one definition: names and order for the C ABI come from it.

const std = @import("std");

pub const Counter = enum(u32) {
    records_total,
    record_bytes_total,
    barriers_total,
    groups_total,
    group_bytes_total,
    commit_ns_total,
    syncs_total,
    sync_ns_total,
    applied_bytes_total,
    apply_failures_total,
    log_failures_total,
    admissions_closed_total,
    slots_damaged_total,
    records_rejected_total,
    claims_passed_total,
    claims_aborted_total,
    spans_left_behind_total,
    heads_repaired_total,
    worker_sleeps_total,
    sessions_opened_total,
    sessions_open,
    messages_bad_total,
    files_registered_total,
    files_refused_total,
    files_open,
    files_released_total,
    threads_attached_total,
    fences_total,
    foreign_truncates_total,
    /// Appends that did not land where the worker took the file's end to be.
    foreign_appends_total,
    checkpoints_total,
    checkpoint_failures_total,
    target_sync_failures_total,
    replayed_records_total,
    replayed_bytes_total,
    ring_slots_recovered_total,
    rings_adopted_total,
    rings_lost_total,
    records_quarantined_total,
    events_dropped_total,
    /// Above the limit on how many of one name are said.
    events_left_out_total,
    // How old the oldest record was when a group, or a sync of several, made it durable.
    durable_age_below_500us_total,
    durable_age_below_1ms_total,
    durable_age_below_2ms_total,
    durable_age_below_4ms_total,
    durable_age_below_8ms_total,
    durable_age_below_16ms_total,
    durable_age_below_64ms_total,
    durable_age_above_64ms_total,
};

const ages = [_]struct { u64, Counter }{
    .{ 500, .durable_age_below_500us_total },
    .{ 1_000, .durable_age_below_1ms_total },
    .{ 2_000, .durable_age_below_2ms_total },
    .{ 4_000, .durable_age_below_4ms_total },
    .{ 8_000, .durable_age_below_8ms_total },
    .{ 16_000, .durable_age_below_16ms_total },
    .{ 64_000, .durable_age_below_64ms_total },
};

pub fn ofAge(age_ns: u64) Counter {
    for (ages) |row| {
        if (age_ns < row[0] * std.time.ns_per_us) return row[1];
    }
    return .durable_age_above_64ms_total;
}

pub const count = std.enums.values(Counter).len;

pub const Counters = struct {
    values: [count]u64 = @splat(0),

    /// Any thread.
    pub fn add(counters: *Counters, counter: Counter, amount: u64) void {
        _ = @atomicRmw(u64, &counters.values[@intFromEnum(counter)], .Add, amount, .monotonic);
    }

    pub fn subtract(counters: *Counters, counter: Counter, amount: u64) void {
        _ = @atomicRmw(u64, &counters.values[@intFromEnum(counter)], .Sub, amount, .monotonic);
    }

    pub fn get(counters: *const Counters, counter: Counter) u64 {
        return @atomicLoad(u64, &counters.values[@intFromEnum(counter)], .monotonic);
    }
};

pub fn name(index: u32) [:0]const u8 {
    return @tagName(@as(Counter, @enumFromInt(index)));
}
