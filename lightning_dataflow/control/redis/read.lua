-- Runs the command ARGV[2], …, which only reads; an error instead of a reply of more than ARGV[1] bytes.
local function size(value)
  if type(value) == 'string' then
    return #value
  end
  local bytes = 0
  if type(value) == 'table' then
    for _, item in ipairs(value) do
      bytes = bytes + size(item)
    end
  end
  return bytes
end

local reply = redis.call(unpack(ARGV, 2))
if size(reply) > tonumber(ARGV[1]) then
  return redis.error_reply('DAMAGED ' .. ARGV[3] .. ' (too large)')
end
return reply
