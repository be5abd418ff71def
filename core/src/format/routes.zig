//! The table of routes as the daemon hands it to clients: a sealed memfd, and the matching of paths, which
//! client and daemon both do with this one function.
//!
//! ```
//! 0    TableHeader
//! 32   Entry × count
//! …    strings: each pattern and name, without a terminator
//! ```

const std = @import("std");
const assert = std.debug.assert;

pub const magic: u64 = std.mem.readInt(u64, "ELGROUT\x00", .little);
pub const version: u32 = 1;
pub const pattern_bytes_max: u32 = 4096;
pub const name_bytes_max: u32 = 64;
pub const table_bytes_max: u32 = 8 << 20;

pub const TableHeader = extern struct {
    magic: u64,
    version: u32,
    count: u32,
    generation: u32,
    reserved: u32,
    total_bytes: u64,
};

pub const Flags = packed struct(u32) {
    /// flush: always. Every write returns durable.
    flush_always: bool = false,
    /// visibility: immediate. Every write returns applied.
    visibility_immediate: bool = false,
    /// on_full: error. A full ring or log answers ENOSPC instead of blocking.
    on_full_error: bool = false,
    /// flush: interval or none. Records become durable late or never by themselves: an fsync must be a barrier.
    durable_when_asked: bool = false,
    /// Gone from the configuration while some of its files are open: it takes no others. Behind all that are not.
    retired: bool = false,
    reserved: u27 = 0,
};

pub const Entry = extern struct {
    /// Index into Positions.routes; the same for a route's whole life in one daemon.
    route: u32,
    flags: Flags,
    pattern_offset: u32,
    pattern_length: u32,
    name_offset: u32,
    name_length: u32,
    reserved: u64,
};

pub const Table = struct {
    memory: []const u8,

    pub const Error = error{ NotARouteTable, RouteTableVersion, RouteTableDamaged };

    /// Checks everything once, so that `entry`, `pattern` and `name` need not.
    pub fn init(memory: []const u8) Error!Table {
        if (memory.len < @sizeOf(TableHeader)) return error.NotARouteTable;
        const table = Table{ .memory = memory };
        const head = table.header();
        if (head.magic != magic) return error.NotARouteTable;
        if (head.version != version) return error.RouteTableVersion;
        if (head.total_bytes != memory.len) return error.RouteTableDamaged;
        if (@sizeOf(TableHeader) + @as(u64, head.count) * @sizeOf(Entry) > memory.len) return error.RouteTableDamaged;
        for (0..head.count) |index| {
            const e = table.entry(@intCast(index));
            if (@as(u64, e.pattern_offset) + e.pattern_length > memory.len) return error.RouteTableDamaged;
            if (@as(u64, e.name_offset) + e.name_length > memory.len) return error.RouteTableDamaged;
        }
        return table;
    }

    pub fn header(table: Table) *const TableHeader {
        return @ptrCast(@alignCast(table.memory.ptr));
    }

    pub fn entry(table: Table, index: u32) *const Entry {
        assert(index < table.header().count);
        const entries: [*]const Entry = @ptrCast(@alignCast(table.memory.ptr + @sizeOf(TableHeader)));
        return &entries[index];
    }

    pub fn pattern(table: Table, e: *const Entry) []const u8 {
        return table.memory[e.pattern_offset..][0..e.pattern_length];
    }

    pub fn name(table: Table, e: *const Entry) []const u8 {
        return table.memory[e.name_offset..][0..e.name_length];
    }

    /// The first entry whose pattern matches the (absolute, symlink-free) path.
    pub fn match(table: Table, path: []const u8) ?*const Entry {
        for (0..table.header().count) |index| {
            const e = table.entry(@intCast(index));
            if (globMatches(table.pattern(e), path)) return e;
        }
        return null;
    }
};

/// What in a pattern stands for something else.
pub const wildcards = "*?";

/// `*` and `?` stay within a path component, `**` crosses components (and may be empty), all else is literal.
/// "/a/**" matches everything below /a, not /a itself; "/a/**/b" matches /a/b too. No recursion, and time
/// bounded by |pattern| × |path|: whatever stands between two `**` may as well match as far left as it can,
/// since the later one takes up the difference, so only the last `*` and the last `**` are ever gone back to.
pub fn globMatches(pattern: []const u8, path: []const u8) bool {
    const Retry = struct { pattern: usize, path: usize, whole_components: bool };
    var p: usize = 0;
    var s: usize = 0;
    var star: ?Retry = null;
    var double: ?Retry = null;
    while (true) {
        if (p < pattern.len and pattern[p] == '*') {
            star = null;
            if (p + 1 < pattern.len and pattern[p + 1] == '*') {
                p += 2;
                // Behind a slash, "**/" stands for any number of whole components, none included.
                const whole = p < pattern.len and pattern[p] == '/' and s > 0 and path[s - 1] == '/';
                if (whole) p += 1;
                double = .{ .pattern = p, .path = s, .whole_components = whole };
            } else {
                p += 1;
                star = .{ .pattern = p, .path = s, .whole_components = false };
            }
            continue;
        }
        if (s == path.len and p == pattern.len) return true;
        if (s < path.len and p < pattern.len and
            (pattern[p] == path[s] or (pattern[p] == '?' and path[s] != '/')))
        {
            p += 1;
            s += 1;
            continue;
        }
        if (star) |*retry| {
            if (retry.path < path.len and path[retry.path] != '/') {
                retry.path += 1;
                s = retry.path;
                p = retry.pattern;
                continue;
            }
        }
        if (double) |*retry| {
            if (retry.path == path.len) return false;
            if (retry.whole_components) {
                const slash = std.mem.indexOfScalarPos(u8, path, retry.path, '/') orelse return false;
                retry.path = slash + 1;
            } else retry.path += 1;
            s = retry.path;
            p = retry.pattern;
            star = null;
            continue;
        }
        return false;
    }
}

comptime {
    assert(@sizeOf(TableHeader) == 32);
    assert(@sizeOf(Entry) == 32);
}

test "globs" {
    const Case = struct { []const u8, []const u8, bool };
    const cases = [_]Case{
        .{ "/var/log/orders/**", "/var/log/orders/a.log", true },
        .{ "/var/log/orders/**", "/var/log/orders/x/y/a.log", true },
        .{ "/var/log/orders/**", "/var/log/orders", false },
        .{ "/var/log/orders/**", "/var/log/ordersX/a", false },
        .{ "/var/log/*.log", "/var/log/a.log", true },
        .{ "/var/log/*.log", "/var/log/x/a.log", false },
        .{ "/var/log/*", "/var/log/", true },
        .{ "/a/**/b", "/a/b", true },
        .{ "/a/**/b", "/a/x/b", true },
        .{ "/a/**/b", "/a/x/y/b", true },
        .{ "/a/**/b", "/a/xb", false },
        .{ "/a/**/*.log", "/a/x/y/z.log", true },
        .{ "/a/**/*.log", "/a/z.log", true },
        .{ "/a/**/*.log", "/a/z.txt", false },
        .{ "/a/**/x/**/b", "/a/x/x/c/b", true },
        .{ "/a/**/x/**/b", "/a/c/x/b", true },
        .{ "/a/**/x/**/b", "/a/c/xx/b", false },
        .{ "/a/**.log", "/a/b/c.log", true },
        .{ "/a/*/c", "/a/b/c", true },
        .{ "/a/*/c", "/a/b/d/c", false },
        .{ "/a/?.log", "/a/b.log", true },
        .{ "/a/?.log", "/a//.log", false },
        .{ "/a/?x?/**", "/a/[x]/b", true },
        .{ "/**", "/anything/at/all", true },
        .{ "/a/*b*c", "/a/xbxbxc", true },
        .{ "/a/*b*c", "/a/xbxbxd", false },
        .{ "/exact", "/exact", true },
        .{ "/exact", "/exactly", false },
        .{ "", "", true },
        .{ "", "/", false },
    };
    for (cases) |case| {
        std.testing.expectEqual(case[2], globMatches(case[0], case[1])) catch |err| {
            std.debug.print("pattern {s} path {s}\n", .{ case[0], case[1] });
            return err;
        };
    }
}
