-- The log of a run in Redis, and what every script of a run begins with. All scripts get the same KEYS. Operations have
-- arguments of their own and, behind them in ARGV, from `REST` on, a list of any length.
local CARD, LINES, INDEX, TOTALS, CLIENTS, ROWS, WANTED, LEASED, HOLDERS, PARTS, FAILED = unpack(KEYS)
local MOST = 4000  -- arguments that fit on Lua's stack
local HEAD, SIZE_AT = 32, 25  -- bytes of a record's head, and where its line's size stands: see redis_records.py
local KEEP_S = 3600  -- what nobody needs any more stays that long
local REST = 7 + tonumber(ARGV[6])
local ops = {}

local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function int(number)  -- concatenation would round above 1e14
  return string.format('%d', number)
end

-- every `step`th of the list, from its `first`th on
local function listed(step, first)
  local found = {}
  for i = REST + first - 1, #ARGV, step do
    found[#found + 1] = ARGV[i]
  end
  return found
end

-- a hash as a table
local function hash(key)
  local flat, found = redis.call('HGETALL', key), {}
  for i = 1, #flat, 2 do
    found[flat[i]] = flat[i + 1]
  end
  return found
end

local function total(name)
  return tonumber(redis.call('HGET', TOTALS, name) or 0)
end

-- command KEY all of list, in pieces
local function many(command, key, list)
  for first = 1, #list, MOST do
    redis.call(command, key, unpack(list, first, math.min(first + MOST - 1, #list)))
  end
end

-- Each record is its head and its line. Their numbers in the log count up from 1. One entry of the index holds the heads of
-- one append, and one field of the lines, called by the number of its first record, its lines; the nonce tells apart what two
-- histories of one server wrote under one number.
local function append(nonce, heads, lines)
  local count = #heads / HEAD
  local first = int(redis.call('HINCRBY', TOTALS, 'records', count) - count + 1)
  redis.call('HSET', LINES, first, lines)
  redis.call('XADD', INDEX, first .. '-' .. nonce, 'h', heads)
end

-- of the heads and lines of records, those of the records chosen, in their order
local function cut(heads, lines, chosen)
  local some_heads, some_lines, at, n = {}, {}, 1, 1
  for i = 1, #heads / HEAD do
    local from = HEAD * (i - 1)
    local size = struct.unpack('<I4', heads, from + SIZE_AT)
    if chosen[n] == i then
      some_heads[n], some_lines[n] = string.sub(heads, from + 1, from + HEAD), string.sub(lines, at, at + size - 1)
      n = n + 1
    end
    at = at + size
  end
  return table.concat(some_heads), table.concat(some_lines)
end

ops.append = function(nonce, heads, lines)
  append(nonce, heads, lines)
  return true
end

-- drops all records before one of the index
ops.trim = function(following)
  local entries = redis.call('XRANGE', INDEX, '-', '(' .. following .. '-0')
  local numbers = {}
  for i, entry in ipairs(entries) do
    numbers[i] = string.match(entry[1], '^%d+')
  end
  many('HDEL', LINES, numbers)
  redis.call('XTRIM', INDEX, 'MINID', following .. '-0')
  return true
end
