-- The log of a run in Redis, and what every script of a run begins with. All scripts get the same KEYS. Operations have
-- arguments of their own and, behind them in ARGV, from `REST` on, a list of any length.
local CARD, LINES, INDEX, TOTALS, CLIENTS, ROWS, WANTED, LEASED, HOLDERS, PARTS, FAILED = unpack(KEYS)
local MOST = 4000  -- arguments that fit on Lua's stack
local SLICE = 1000  -- appends that are dropped at a time: nobody else is served meanwhile
-- bytes of a record's head, where its line's size stands, and lines that are kept together: see redis_records.py
local HEAD, SIZE_AT, CHUNK = 32, 25, 8
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

-- every `step`th of the list, from its `first`th on, to its `last`th at most
local function listed(step, first, last)
  local found = {}
  for i = REST + first - 1, last and REST + last - 1 or #ARGV, step do
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
-- one append, a field of the lines those of CHUNK of its records, called by the number of the first; the nonce tells apart what
-- two histories of one server wrote under one number.
local function append(nonce, heads, chunks)
  local count, pairs = #heads / HEAD, {}
  local first = redis.call('HINCRBY', TOTALS, 'records', count) - count + 1
  for i, chunk in ipairs(chunks) do
    pairs[2 * i - 1], pairs[2 * i] = int(first + CHUNK * (i - 1)), chunk
  end
  many('HSET', LINES, pairs)
  redis.call('XADD', INDEX, int(first) .. '-' .. nonce, 'h', heads)
end

-- heads and chunks of those records alone that are chosen, in their order
local function cut(heads, chunks, chosen)
  local all, some_heads, lines, at, n = table.concat(chunks), {}, {}, 1, 0
  for i = 1, #heads / HEAD do
    local from = HEAD * (i - 1)
    local size = struct.unpack('<I4', heads, from + SIZE_AT)
    if chosen[n + 1] == i then
      n = n + 1
      some_heads[n], lines[n] = string.sub(heads, from + 1, from + HEAD), string.sub(all, at, at + size - 1)
    end
    at = at + size
  end
  local some_chunks = {}
  for i = 1, n, CHUNK do
    some_chunks[#some_chunks + 1] = table.concat(lines, '', i, math.min(i + CHUNK - 1, n))
  end
  return table.concat(some_heads), some_chunks
end

-- list: chunks
ops.append = function(nonce, heads)
  append(nonce, heads, listed(1, 1))
  return true
end

-- drops the records before one of the index, of at most SLICE appends; returns whether there are more
ops.trim = function(following)
  local entries = redis.call('XRANGE', INDEX, '-', '(' .. following .. '-0', 'COUNT', SLICE + 1)
  local numbers, next = {}, following .. '-0'
  for i, entry in ipairs(entries) do
    if i > SLICE then
      next = entry[1]
      break
    end
    local first = tonumber(string.match(entry[1], '^%d+'))
    for number = first, first + #entry[2][2] / HEAD - 1, CHUNK do
      numbers[#numbers + 1] = int(number)
    end
  end
  many('HDEL', LINES, numbers)
  redis.call('XTRIM', INDEX, 'MINID', next)
  return #entries > SLICE
end
