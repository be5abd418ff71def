//! What cannot be placed is kept: `<log directory>/<route>/quarantine/unplaced-<file id>.records` holds each
//! record's header and payload as they were. Operations of the ring that no log knows a file for go to
//! `<log directory>/quarantine.d/`, with their slot's header.

const std = @import("std");
const State = @import("state.zig").State;
const Route = @import("route.zig").Route;

/// Any thread that owns the record; blocks until it is durable.
pub fn add(state: *State, route: ?*Route, header: []const u8, payload: []const u8, about: About) void {
    state.counters.add(.records_quarantined_total, 1);
    var buffer: [4096]u8 = undefined;
    const name: []const u8 = if (route) |known| known.name else "";
    const where = save(&buffer, state.log_directory, name, header, payload, about.file_id) catch |err| {
        return state.events.post(.@"error", "record_not_quarantined", .{ .route = name, .path = about.path, .reason = about.reason, .@"error" = @errorName(err) });
    };
    if (!about.silent) state.events.post(.@"error", "records_quarantined", .{ .route = name, .path = about.path, .reason = about.reason, .kept_in = where });
}

pub const About = struct {
    file_id: u64,
    path: []const u8,
    reason: []const u8,
    /// Say it in an event only where the keeping failed.
    silent: bool = false,
};

fn save(buffer: *[4096]u8, log_directory: []const u8, route: []const u8, header: []const u8, payload: []const u8, file_id: u64) ![]const u8 {
    const directory = if (route.len > 0)
        try std.fmt.bufPrint(buffer, "{s}/{s}/quarantine", .{ log_directory, route })
    else
        try std.fmt.bufPrint(buffer, "{s}/quarantine.d", .{log_directory});
    std.fs.makeDirAbsolute(directory) catch |err| if (err != error.PathAlreadyExists) return err;
    const name = try std.fmt.bufPrint(buffer[directory.len..], "/unplaced-{x:0>16}.records", .{file_id});
    const path = buffer[0 .. directory.len + name.len];
    const file = try std.fs.createFileAbsolute(path, .{ .truncate = false, .mode = 0o600 });
    defer file.close();
    try file.seekFromEnd(0);
    try file.writeAll(header);
    try file.writeAll(payload);
    try file.sync();
    return path;
}
