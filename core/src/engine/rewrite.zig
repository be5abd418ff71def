//! What may take long at a target, off the worker: syncing it for a checkpoint, and writing it again from the log where
//! it has refused a write, lost one, or fallen behind. On a thread of its file system (disk/lanes.zig).
//!
//! A sync that failed is never just repeated: the kernel tells of a lost page once, and counts it as clean from then
//! on. All of the file's records that no successful sync covers are written again, then synced.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const wal = @import("../format/wal.zig");
const os = @import("os.zig");
const files = @import("files.zig");
const File = files.File;
const readback = @import("wal/readback.zig");
const storage_module = @import("wal/storage.zig");

/// The file's errand, done: 0, or -errno.
pub fn perform(file: *File) i32 {
    return -switch (file.errand) {
        .sync => sync(file),
        // What has no name any more is nothing that a power cut could take away.
        .release => if (os.linksOf(file.sync_fd) == 0) 0 else sync(file),
        .rewrite => rewrite(file),
    };
}

fn sync(file: *File) i32 {
    // A directory that we may not read keeps the former name in the log, and is no fault of the file's.
    file.name_synced = file.naming.former.len > 0 and files.syncParent(file.identity.pathText()) == 0;
    return os.check(linux.fdatasync(file.sync_fd)).err();
}

const Writing = struct {
    file: *File,
    fd: i32,
    errno: i32 = 0,

    fn visit(context: *anyopaque, header: *const wal.RecordHeader, payload: []const u8) error{VisitorStopped}!void {
        const writing: *Writing = @ptrCast(@alignCast(context));
        if (header.file_id != writing.file.file_id) return;
        writing.errno = apply(writing.fd, header, payload);
        if (writing.errno != 0) return error.VisitorStopped;
    }
};

/// Errno, or 0: everything of the file up to `rewrite_to_lsn` is in it, and synced.
fn rewrite(file: *File) i32 {
    assert(file.rewrite_lsn > 0);
    // The control thread may have closed the file for writing, since nobody has it open any more.
    const dropped = files.dropPages(file.sync_fd, if (file.pages_suspect) .all else .what_can_go);
    if (dropped != 0) {
        file.pages_suspect = true;
        return dropped;
    }
    // Where its mode was changed since, what was open before still writes.
    const own = files.openAgain(file.sync_fd, .WRONLY);
    defer if (own) |fd| os.close(fd);
    var writing = Writing{ .file = file, .fd = own orelse file.fd };
    // Nothing at or below a fence is written again.
    const first_lsn = @max(file.rewrite_lsn, file.fence_lsn + 1);
    readback.readBack(file.log, first_lsn, file.rewrite_to_lsn, .{ .context = &writing, .visit = Writing.visit }) catch |err| return switch (err) {
        error.VisitorStopped => writing.errno,
        error.OutOfMemory => @intFromEnum(linux.E.NOMEM),
        else => |other| storage_module.errnoOf(other),
    };
    const errno = os.check(linux.fdatasync(file.sync_fd)).err();
    if (errno != 0) file.pages_suspect = true;
    return errno;
}

/// Brings one record into its target; what is no change of a file's content is left out. Errno, or 0.
pub fn apply(fd: i32, header: *const wal.RecordHeader, payload: []const u8) i32 {
    return switch (@as(wal.Kind, @enumFromInt(header.kind))) {
        .write => writeAll(fd, payload, header.offset),
        .truncate => os.check(linux.ftruncate(fd, @intCast(header.offset))).err(),
        .allocate => if (payload.len == 8)
            os.check(linux.fallocate(fd, @bitCast(header.argument), @intCast(header.offset), @intCast(std.mem.readInt(u64, payload[0..8], .little)))).err()
        else
            0,
        else => 0,
    };
}

pub fn writeAll(fd: i32, payload: []const u8, offset: u64) i32 {
    var done: usize = 0;
    while (done < payload.len) {
        switch (os.check(linux.pwrite(fd, payload.ptr + done, payload.len - done, @intCast(offset + done)))) {
            .value => |count| {
                if (count == 0) return @intFromEnum(linux.E.IO);
                done += count;
            },
            .errno => |errno| if (errno != @intFromEnum(linux.E.INTR)) return errno,
        }
    }
    return 0;
}
