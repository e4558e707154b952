-- Lines of a run's log. Arguments: number of the append, first and last byte of its lines, of each piece. False for what was dropped.
local LINES, found = KEYS[2], {}
for i = 1, #ARGV, 3 do
  local lines = redis.call('HGET', LINES, ARGV[i])
  found[#found + 1] = lines and string.sub(lines, ARGV[i + 1], ARGV[i + 2])
end
return found
