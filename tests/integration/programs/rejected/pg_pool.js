// Is rejected on a connection from pg-pool; see pools.py.
const { Pool } = require('pg')

async function use(pool, sql) {
  const client = await pool.connect()
  try {
    await client.query('BEGIN')
    await client.query(sql)
    await client.query('COMMIT')
  } catch (error) {
    await client.query('ROLLBACK')
    throw error
  } finally {
    client.release()
  }
}

async function main() {
  const pool = new Pool({ max: 1 })
  pool.on('connect', (client) => client.on('error', () => {}))
  pool.on('error', () => {})
  await use(pool, 'SELECT 1')
  console.log(JSON.stringify({ state: 'query' }))
  try {
    await use(pool, 'SELECT pg_sleep(60)')
  } catch ({ message: text }) {
    const afterwards = []
    for (let attempt = 0; attempt < 100; attempt++) {
      try {
        await use(pool, 'SELECT 1')
        break
      } catch (another) {
        afterwards.push(another.message)
        await new Promise((go) => setTimeout(go, 50))
      }
    }
    console.log(JSON.stringify({ text, afterwards }))
  }
  await pool.end()
}

main()
