const std = @import("std");

test {
    _ = @import("format/checksum.zig");
    _ = @import("format/ring.zig");
    _ = @import("format/positions.zig");
    _ = @import("format/routes.zig");
    _ = @import("format/control.zig");
    _ = @import("format/wal.zig");
}

test "docs/formats.md is what the types say" {
    const written = try std.fs.cwd().readFileAlloc(std.testing.allocator, "docs/formats.md", 1 << 20);
    defer std.testing.allocator.free(written);
    var out: std.Io.Writer.Allocating = .init(std.testing.allocator);
    defer out.deinit();
    try @import("formats_doc.zig").write(&out.writer);
    std.testing.expectEqualStrings(out.written(), written) catch |err| {
        std.debug.print("write it anew: zig run -lc core/src/formats_doc.zig > docs/formats.md (tests run in the repository's root)\n", .{});
        return err;
    };
}
