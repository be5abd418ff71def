//! Deliberate faults of the log, for the simulation to find: one that does not notice them is worth nothing. In a
//! build that is no test every question is `false` at compile time, and nothing of this is left.
//!
//! A build has mutants when it is a test, or when its root declares `elgate_log_mutants` (wal_fuzz.zig).

const std = @import("std");
const builtin = @import("builtin");
const root = @import("root");
const block_size = @import("../../format/wal.zig").block_size;
const storage_module = @import("storage.zig");
const Storage = storage_module.Storage;
const File = storage_module.File;

pub const enabled = builtin.is_test or @hasDecl(root, "elgate_log_mutants");

pub const Mutant = enum {
    /// Commits leave RWF_DSYNC out.
    commit_not_synced,
    /// A prepared segment is not synced before it is used.
    preparation_not_synced,
    /// A directory is not synced after names in it have changed.
    directory_not_synced,
    record_header_checksum_ignored,
    payload_checksum_ignored,
    group_header_checksum_ignored,
    segment_header_checksum_ignored,
    checkpoint_checksum_ignored,
    /// Groups and records of an earlier life of a recycled segment count.
    segment_id_ignored,
    /// A group counts wherever in its segment it lies.
    group_place_ignored,
    /// A segment is whose its first block says, whatever its last block and its groups say.
    segment_ends_not_compared,
    /// Of two segments that hold the same LSNs, the one of the lower epoch counts.
    epoch_ignored,
    /// A new segment does not void what older ones hold from its first LSN on.
    nothing_voided,
    /// The cursor is written before the targets are synced.
    cursor_before_targets,
    /// Segments go before the cursor that allows it is written.
    segments_before_cursor,
    /// Segments go when one of the checkpoint's two blocks still needs them.
    one_checkpoint_block_enough,
    /// After a failed write the same blocks are written again.
    failed_write_repeated,
    /// After a failed write the segment is synced, and believed when that succeeds.
    failed_write_synced,
    /// A segment to which a write failed gets a new life.
    failed_segment_recycled,
    /// A commit rewrites the block before it, which holds acknowledged records.
    block_rewritten,
    /// What was not known to be durable is synced where it lies, instead of being committed anew.
    tail_only_synced,
    /// The header that voids the tail goes out before the tail is safe behind it.
    tail_voided_first,
    /// Damage ends the log, as a torn tail would.
    damage_taken_for_tail,
    /// A receipt names a record that is there.
    receipt_too_wide,
    // Of groups that are synced later: unsynced_test.zig notices these.
    /// What was only written is taken for durable.
    sync_left_out,
    /// A sync that failed is repeated, and believed.
    failed_sync_repeated,
    /// What is good behind a hole in what was not synced is delivered.
    hole_ignored,

    pub fn isOfUnsynced(mutant: Mutant) bool {
        return @intFromEnum(mutant) >= @intFromEnum(Mutant.sync_left_out);
    }
};

pub var active: ?Mutant = null;

pub inline fn is(comptime mutant: Mutant) bool {
    if (!enabled) return false;
    return active == mutant;
}

/// For block_rewritten.
pub fn rewriteBlockBefore(storage: Storage, file: File, offset: u64) storage_module.Error!void {
    comptime std.debug.assert(enabled);
    if (offset <= block_size) return;
    var block: [block_size]u8 align(block_size) = undefined;
    _ = try storage.read(file, &block, offset - block_size);
    try storage.write(file, &.{&block}, offset - block_size, true);
}
