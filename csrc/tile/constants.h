#pragma once

namespace cce {

// Width of a vocab tile: the unit in which the backward visits or skips columns, and a row of the tile map.
constexpr int kTileColumns = 256;

// Width of a block of the threshold method's filter.
constexpr int kFilterColumns = 128;

constexpr int kWarpLanes = 32;

}  // namespace cce
